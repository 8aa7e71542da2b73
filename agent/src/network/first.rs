//! Of several things that fail, the first is told.

use crate::error::{Error, Result};

/// What has failed first.
#[derive(Default)]
pub(super) struct FirstError(Option<Error>);

impl FirstError {
    /// What is there of a result; its error is kept if it is the first, and logged if not.
    pub fn of<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) if self.0.is_none() => {
                self.0 = Some(error);
                None
            }
            Err(error) => {
                tracing::warn!("{}", error.full());
                None
            }
        }
    }

    /// It, if there is one.
    ///
    /// # Errors
    ///
    /// Just that.
    pub fn result(self) -> Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}
