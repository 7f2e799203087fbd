//! Having the kernel verify the program, whatever comes in between.

use std::error::Error;

use nix::errno::Errno;

use super::explain;

/// So often it is tried. The verifier takes milliseconds, and signals come seldom.
const TRIES: usize = 20;

/// Loads a program. Where a signal for the agent comes meanwhile, be it that a child has ended, the verifier gives up (`EAGAIN`).
/// That says nothing about the program, so it is tried again.
pub(super) fn load<E: Error + 'static>(mut load: impl FnMut() -> Result<(), E>) -> Result<(), E> {
    for _ in 1..TRIES {
        match load() {
            Err(error) if explain::errno(&error) == Some(Errno::EAGAIN) => {}
            done => return done,
        }
    }
    load()
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// How often it is tried where the first so many tries end so, and whether it is loaded then.
    fn tries(failing: usize, errno: Errno) -> (usize, bool) {
        let mut tries = 0;
        let done = load(|| {
            tries += 1;
            if tries > failing {
                Ok(())
            } else {
                Err(io::Error::from(errno))
            }
        });
        (tries, done.is_ok())
    }

    #[test]
    fn a_signal_while_the_kernel_verifies_is_no_reason_not_to_start() {
        assert_eq!(tries(0, Errno::EAGAIN), (1, true));
        assert_eq!(tries(3, Errno::EAGAIN), (4, true));
        assert_eq!(tries(usize::MAX, Errno::EAGAIN), (TRIES, false));
        assert_eq!(tries(1, Errno::EACCES), (1, false));
    }
}
