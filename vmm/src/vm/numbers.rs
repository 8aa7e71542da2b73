//! Numbers of KVM's things: each is one owner's until it is given back. A machine whose
//! devices come and go must not run out of them.

use std::sync::{Mutex, PoisonError};

/// See the module.
#[derive(Debug, Default)]
pub struct Numbers(Mutex<Used>);

#[derive(Debug, Default)]
struct Used {
    next: u32,
    free: Vec<u32>,
}

impl Numbers {
    /// One that nobody has.
    pub fn take(&self) -> u32 {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let next = used.next;
        used.free.pop().unwrap_or_else(|| {
            used.next += 1;
            next
        })
    }

    /// Lets somebody else have it.
    pub fn give_back(&self, number: u32) {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        used.free.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_one_owner_s_and_come_back() {
        let numbers = Numbers::default();
        assert_eq!([numbers.take(), numbers.take()], [0, 1]);
        numbers.give_back(0);
        assert_eq!([numbers.take(), numbers.take()], [0, 2]);
    }
}
