//! Random sequences of offences, ends of bans, operators' words, clocks that are set, meddling, crashes and restarts, with the real
//! engine, a real ledger on disk and real maps in a namespace: after each comparison the kernel has what a small model says.
#![expect(clippy::unwrap_used, reason = "a test panics with its evidence")]

mod model;

use model::{
    kernel::Kernel,
    rig::{Disk, Rig},
};
use portcullis_tests::lab::{EDGE_INTERFACE, Lab};

#[test]
fn the_kernel_has_what_the_model_says_whatever_happens() {
    let lab = Lab::new().unwrap();
    let run = || {
        model::run(32, 60, |steps| {
            let folder = model::folder();
            let kernel = Kernel::xdp(lab.pin_dir(), EDGE_INTERFACE);
            let mut rig = Rig::new(kernel, Disk::Folder(folder.path().to_owned(), None));
            rig.run(steps);
            rig.met
        });
    };
    lab.edge().run(run).unwrap();
}
