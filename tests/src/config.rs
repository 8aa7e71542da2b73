//! nacre's configuration, changed for a while.

use std::fs;

/// Where it is.
pub const CONFIG: &str = "/etc/nacre/nacre.toml";

/// The configuration with something changed, until this is dropped.
pub struct Changed {
    before: String,
}

impl Changed {
    /// Gives a key another value, as TOML has it.
    ///
    /// # Panics
    ///
    /// When there is no such key.
    #[must_use]
    pub fn new(key: &str, value: &str) -> Self {
        Self::by(|before| {
            let mut found = false;
            let after: Vec<String> = before
                .lines()
                .map(|line| {
                    let this = line.starts_with(&format!("{key} ="));
                    found |= this;
                    if this {
                        format!("{key} = {value}")
                    } else {
                        line.to_owned()
                    }
                })
                .collect();
            assert!(found, "no key {key} in {CONFIG}");
            after.join("\n")
        })
    }

    /// Makes another text of it.
    ///
    /// # Panics
    ///
    /// When there is no configuration.
    #[must_use]
    pub fn by(change: impl FnOnce(&str) -> String) -> Self {
        let before = fs::read_to_string(CONFIG).expect("there is a configuration");
        fs::write(CONFIG, change(&before)).expect("/etc is writable");
        Self { before }
    }

    /// Takes the file away.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn removed() -> Self {
        let before = fs::read_to_string(CONFIG).expect("there is a configuration");
        fs::remove_file(CONFIG).expect("/etc is writable");
        Self { before }
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        fs::write(CONFIG, &self.before).expect("/etc is writable");
    }
}
