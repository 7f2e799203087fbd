//! Random sequences of offences, ends of bans, operators' words, clocks that are set, meddling, crashes and restarts, with the real
//! engine, a real ledger on disk and a real kernel: after each comparison it has what a small model says.
#![expect(clippy::unwrap_used, reason = "a test panics with its evidence")]

mod model;

use model::{
    kernel::Kernel,
    rig::{Disk, Rig},
};
use portcullis_tests::lab::{EDGE_INTERFACE, Lab};

/// So many sequences, each with a back end that is as new, in a namespace of their own.
fn run(cases: u32, kernel: fn(&Lab) -> Kernel) {
    let lab = Lab::new().unwrap();
    let run = || {
        model::run(cases, 60, |steps| {
            let folder = model::folder();
            let disk = Disk::Folder(folder.path().to_owned(), None);
            let mut rig = Rig::new(kernel(&lab), disk);
            rig.run(steps);
            rig.met
        });
    };
    lab.edge().run(run).unwrap();
}

#[test]
fn the_kernel_has_what_the_model_says_whatever_happens() {
    run(32, |lab| Kernel::xdp(lab.pin_dir(), EDGE_INTERFACE));
}

#[test]
fn the_sets_of_the_fallback_have_what_the_model_says_whatever_happens() {
    run(12, |_| Kernel::ipset());
}
