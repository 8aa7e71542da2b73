//! Numbers of KVM's things: each is one owner's until it is given back. A machine whose
//! devices come and go must not run out of them.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// See the module.
#[derive(Debug)]
pub struct Numbers {
    limit: u32,
    used: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    next: u32,
    free: Vec<u32>,
}

impl Numbers {
    /// Nobody has any of `range` yet.
    pub fn new(range: Range<u32>) -> Self {
        Self {
            limit: range.end,
            used: Mutex::new(Used {
                next: range.start,
                free: Vec::new(),
            }),
        }
    }

    /// They are below it.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// One that nobody has, if there is any.
    pub fn take(&self) -> Option<u32> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = used.free.pop() {
            return Some(number);
        }
        let number = used.next;
        let is_left = number < self.limit;
        used.next += u32::from(is_left);
        is_left.then_some(number)
    }

    /// Lets somebody else have it.
    pub fn give_back(&self, number: u32) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.free.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_one_owner_s_and_come_back() {
        let numbers = Numbers::new(7..10);
        assert_eq!([numbers.take(), numbers.take()], [Some(7), Some(8)]);
        numbers.give_back(7);
        assert_eq!([numbers.take(), numbers.take()], [Some(7), Some(9)]);
        assert_eq!([numbers.take(), numbers.take()], [None; 2]);
        numbers.give_back(8);
        assert_eq!([numbers.take(), numbers.take()], [Some(8), None]);
    }
}
