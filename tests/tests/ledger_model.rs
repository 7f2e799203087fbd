//! As `kernel_model`, with more sequences: the kernel is none that needs rights.
#![expect(clippy::unwrap_used, reason = "a test panics with its evidence")]

mod model;

use model::{
    kernel::Kernel,
    rig::{Disk, Rig},
};
use portcullis::enforce::dry_run::DryRun;

#[test]
fn what_is_in_force_is_what_the_model_says_whatever_happens() {
    model::run(500, 60, |steps| {
        let kernel = Kernel::DryRun(DryRun::default());
        let mut rig = Rig::new(kernel, Disk::Memory(Box::default()));
        rig.run(steps);
        rig.met
    });
}

#[test]
fn the_ledger_on_disk_is_what_the_model_says_after_every_crash() {
    model::run(60, 60, |steps| {
        let folder = model::folder();
        let kernel = Kernel::DryRun(DryRun::default());
        let mut rig = Rig::new(kernel, Disk::Folder(folder.path().to_owned(), None));
        rig.run(steps);
        rig.met
    });
}
