//! `setup`: from a bare Debian 12 with rustup to a working build.
//!
//! Three parts: [`Found`] looks, [`Plan`] decides (pure), and [`carry_out`] acts. Looking takes a fraction of a second
//! and no network, so every verb that needs the set-up begins with it.

mod probe;

use std::{fmt, thread, time::Duration};

use anyhow::{Context as _, Result, bail};

use crate::{
    sh,
    toolchain::{LINKED_TOOLCHAIN, TARGET},
};
use probe::{Found, Host};

/// The linker's version that this tree is built with.
const LINKER_VERSION: &str = "0.13.0";

/// The version of fail2ban-rs that the bench measures.
const FAIL2BAN_VERSION: &str = "1.5.4";

/// Where it is, under the workspace root.
pub const FAIL2BAN: &str = "target/tools/bin/fail2ban-rs";

/// Where the LLVM is that the linker is built on: of the compiler's version or newer.
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// What the set-up is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Building, the demo, the tests.
    Build,
    /// The lints too.
    Lint,
    /// The bench with its peers too.
    Bench,
}

/// A Debian package, and what shows that what it brings is there, from wherever it came.
#[derive(Debug, PartialEq, Eq)]
struct Need {
    package: &'static str,
    /// A path, or the bare name of a program.
    file: &'static str,
    why: &'static str,
}

const fn need(package: &'static str, file: &'static str, why: &'static str) -> Need {
    Need { package, file, why }
}

/// Always needed.
const BASE: &[Need] = &[
    need("gcc", "cc", "links Rust programs"),
    need("libc6-dev", "/usr/include/stdlib.h", "links Rust programs"),
    need(
        "nginx-light",
        "nginx",
        "writes the log in demo and tests; not started here",
    ),
    need("iproute2", "ip", "makes the networks of demo and tests"),
    need(
        "iptables",
        "iptables",
        "drops packets where XDP cannot be had",
    ),
    need("ipset", "ipset", "drops packets where XDP cannot be had"),
    need(
        "logrotate",
        "logrotate",
        "rotates the log in tests; not scheduled here",
    ),
];

/// Needed, together, where no toolchain can build for the kernel.
const COMPILER: &[Need] = &[
    need("rustc-web", "/usr/bin/rustc", "compiles the kernel program"),
    need("cargo-web", "/usr/bin/cargo", "compiles the kernel program"),
    need(
        "libstd-rust-web-dev-bpf",
        "/usr/lib/rustlib",
        "has `core` for the kernel's target",
    ),
];

/// Needed to build the linker, and LLVM to run it.
const LINKER: &[Need] = &[
    need(
        "llvm-22-dev",
        "/usr/lib/llvm-22/lib/libLLVM.so",
        "builds bpf-linker",
    ),
    need("zlib1g-dev", "/usr/include/zlib.h", "builds bpf-linker"),
    need("libzstd-dev", "/usr/include/zstd.h", "builds bpf-linker"),
];

/// Needed to lint the kernel program with Debian's compiler.
const CLIPPY: &[Need] = &[need(
    "rust-web-clippy",
    "/usr/bin/clippy-driver",
    "lints the kernel program",
)];

/// Needed to measure: the peers, and what prepares an interface for them.
const PEERS: &[Need] = &[
    need(
        "xdp-tools",
        "xdp-filter",
        "is a peer in the bench; not attached here",
    ),
    need(
        "nftables",
        "nft",
        "is a peer in the bench; not enabled here",
    ),
    need("ethtool", "ethtool", "prepares the bench's interfaces"),
];

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    packages: Vec<&'static Need>,
    /// Components of the host's own toolchain.
    components: Vec<&'static str>,
    link_toolchain: bool,
    install_linker: bool,
    install_fail2ban: bool,
}

impl Plan {
    /// Decides what is missing for `purpose`.
    fn new(found: &Found, purpose: Purpose) -> Self {
        let missing = |needs: &'static [Need]| needs.iter().filter(|need| !found.has(need));
        let mut plan = Self::default();
        plan.packages.extend(missing(BASE));
        if found.toolchain.is_none() {
            if !found.debian_compiler {
                plan.packages.extend(COMPILER);
            }
            plan.link_toolchain = true;
        }
        if !found.linker {
            plan.packages.extend(missing(LINKER));
            plan.install_linker = true;
        }
        if purpose == Purpose::Lint {
            // Another toolchain is rustup's own and has its clippy from there.
            if plan.link_toolchain || found.toolchain.as_deref() == Some(LINKED_TOOLCHAIN) {
                plan.packages.extend(missing(CLIPPY));
            }
            plan.components.extend(&found.missing_components);
        }
        if purpose == Purpose::Bench {
            plan.packages.extend(missing(PEERS));
            plan.install_fail2ban = !found.fail2ban;
        }
        plan
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn package_names(&self) -> Vec<&'static str> {
        self.packages.iter().map(|need| need.package).collect()
    }

    /// The same by hand, for those whom this cannot serve.
    fn commands(&self) -> Vec<String> {
        vec![
            "apt-get update".to_owned(),
            format!(
                "apt-get install --no-install-recommends {}",
                self.package_names().join(" ")
            ),
        ]
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line =
            |kind: &str, what: &str, why: &str| writeln!(f, "  {kind:<9}{what:<25}{why}");
        for need in &self.packages {
            line("package", need.package, need.why)?;
        }
        for component in &self.components {
            line("rustup", component, "needed by the lints")?;
        }
        if self.link_toolchain {
            line(
                "rustup",
                LINKED_TOOLCHAIN,
                "names Debian's compiler, in /usr, for rustup",
            )?;
        }
        if self.install_linker {
            let what = format!("bpf-linker {LINKER_VERSION}");
            line(
                "cargo",
                &what,
                "links the kernel program; a minute's build into target/tools",
            )?;
        }
        if self.install_fail2ban {
            let what = format!("fail2ban-rs {FAIL2BAN_VERSION}");
            line(
                "cargo",
                &what,
                "is a peer in the bench; some minutes' build into target/tools",
            )?;
        }
        Ok(())
    }
}

/// The verb: sets up for everything but the bench's peers, and says so too if there was nothing to do.
pub fn run() -> Result<()> {
    if !ensure(Purpose::Lint)? {
        println!("Nothing is missing.");
    }
    Ok(())
}

/// Sets up what is missing for `purpose`; whether anything was.
pub fn ensure(purpose: Purpose) -> Result<bool> {
    let host = Host::look();
    if !host.has_rustup {
        bail!("rustup is missing; https://rustup.rs says how to get it");
    }
    probe::check_override()?;
    let plan = Plan::new(&Found::look(), purpose);
    if plan.is_empty() {
        return Ok(false);
    }
    eprint!("Set-up: this machine lacks\n{plan}");
    if !plan.packages.is_empty() && !host.can_install() {
        return Err(refuse(&plan, host));
    }
    carry_out(&plan)?;
    let rest = Plan::new(&Found::look(), purpose);
    if !rest.is_empty() {
        bail!("every installation succeeded, yet this machine still lacks\n{rest}");
    }
    eprintln!("Set-up: complete.");
    Ok(true)
}

/// Says how to get by hand what cannot be installed here.
fn refuse(plan: &Plan, host: Host) -> anyhow::Error {
    eprintln!(
        "{} and then run this again:",
        if host.is_debian_12 {
            "Packages can be installed by root only. Run the following as root"
        } else {
            "Packages are installed on Debian 12 only, by the following; install their like here"
        }
    );
    for command in plan.commands() {
        eprintln!("  {command}");
    }
    if plan.link_toolchain {
        eprintln!(
            "Or, in place of Debian's compiler:\n  rustup toolchain install nightly --component rust-src"
        );
    }
    anyhow::anyhow!("missing: {}", plan.package_names().join(", "))
}

fn carry_out(plan: &Plan) -> Result<()> {
    if !plan.packages.is_empty() {
        install_packages(&plan.package_names())?;
    }
    if !plan.components.is_empty() {
        sh::run(
            sh::command("rustup")
                .args(["component", "add"])
                .args(&plan.components),
        )?;
    }
    if plan.link_toolchain {
        sh::run(sh::command("rustup").args(["toolchain", "link", LINKED_TOOLCHAIN, "/usr"]))
            .with_context(|| format!("cannot name a toolchain that builds for {TARGET}"))?;
    }
    if plan.install_linker {
        sh::run(
            sh::cargo()
                .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
                .args(["--no-default-features", "--features", "llvm-22"])
                // One that is there but does not run is replaced.
                .args(["--force", "--root", "target/tools"])
                .env("LLVM_PREFIX", LLVM_PREFIX),
        )
        .context("cannot build bpf-linker")?;
    }
    if plan.install_fail2ban {
        sh::run(
            sh::cargo()
                .args(["install", "fail2ban-rs", "--version", FAIL2BAN_VERSION])
                .args(["--locked", "--force", "--root", "target/tools"]),
        )
        .context("cannot build fail2ban-rs")?;
    }
    Ok(())
}

/// Installs Debian packages without starting a service: Nginx's would open port 80 on this host.
fn install_packages(names: &[&str]) -> Result<()> {
    update_package_lists()?;
    let nginx_ran = probe::is_running("nginx");
    let options = [
        "-qq",
        "-y",
        "--no-install-recommends",
        "-o=DPkg::Lock::Timeout=120",
        "-o=Dpkg::Use-Pty=0",
    ];
    sh::show(
        sh::command("apt-get")
            .arg("install")
            .args(options)
            .args(names),
    );
    sh::run_unshown(
        sh::command("sh")
            .args(["-c", WITHOUT_SERVICES, "sh", "apt-get", "install"])
            .args(options)
            .args(names)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("NEEDRESTART_SUSPEND", "1"),
    )
    .context("cannot install packages")?;
    if names.contains(&"nginx-light") {
        // Nor at the next boot. Whoever wants it says `systemctl enable --now nginx`.
        sh::run(sh::command("update-rc.d").args(["nginx", "disable"]))?;
        if !nginx_ran && probe::is_running("nginx") {
            sh::run(sh::command("service").args(["nginx", "stop"]))
                .context("nginx was started by its installation and cannot be stopped")?;
        }
    }
    Ok(())
}

/// Brings the package lists up to date. Unlike the installation it has no wait of its own for another apt to finish.
fn update_package_lists() -> Result<()> {
    const TRIES: u32 = 12;
    const PAUSE: Duration = Duration::from_secs(10);
    let mut update = sh::command("apt-get");
    // What is looked for in its messages is English.
    update.args(["update", "-qq"]).env("LC_ALL", "C");
    sh::show(&update);
    for _ in 0..TRIES {
        let output = update.output().context("cannot start apt-get")?;
        let messages = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return Ok(());
        }
        if !messages.contains("Could not get lock") {
            // Old lists may still do, for instance behind somebody else's broken source: the installation decides.
            eprint!("{messages}");
            return Ok(());
        }
        eprintln!("Another apt is running; waiting for it.");
        thread::sleep(PAUSE);
    }
    bail!("another apt has held the package lists' lock for two minutes")
}

/// Runs its arguments under a policy that starts no service.
///
/// A shell does it, because its trap takes the policy away again after Ctrl-C too. A policy of the machine's own is kept;
/// one of ours, left behind by a kill, is replaced and then removed.
const WITHOUT_SERVICES: &str = r#"policy=/usr/sbin/policy-rc.d
mark='# Temporary: Portcullis installs packages and starts no service (cargo xtask setup).'
if [ ! -e $policy ] || grep -qF "$mark" $policy; then
    trap 'rm -f $policy' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >$policy && chmod 755 $policy || exit
fi
"$@""#;

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that lacks nothing, with Debian's compiler.
    fn complete() -> Found {
        Found {
            packages: [BASE, LINKER, CLIPPY, PEERS]
                .iter()
                .copied()
                .flatten()
                .map(|n| n.package)
                .collect(),
            toolchain: Some(LINKED_TOOLCHAIN.to_owned()),
            debian_compiler: true,
            linker: true,
            fail2ban: true,
            missing_components: Vec::new(),
        }
    }

    #[test]
    fn a_complete_machine_needs_nothing() {
        assert_eq!(Plan::new(&complete(), Purpose::Lint), Plan::default());
    }

    #[test]
    fn a_bare_machine_needs_everything() {
        let plan = Plan::new(&Found::default(), Purpose::Build);
        assert_eq!(
            plan.package_names().join(" "),
            "gcc libc6-dev nginx-light iproute2 iptables ipset logrotate rustc-web cargo-web \
             libstd-rust-web-dev-bpf llvm-22-dev zlib1g-dev libzstd-dev"
        );
        assert!(plan.link_toolchain && plan.install_linker);
    }

    #[test]
    fn one_lost_package_is_all_that_is_installed() {
        let mut found = complete();
        found.packages.remove("ipset");
        let plan = Plan::new(&found, Purpose::Build);
        assert_eq!(plan.package_names(), ["ipset"]);
        assert!(!plan.link_toolchain && !plan.install_linker);
    }

    #[test]
    fn nightly_with_its_sources_spares_debians_compiler_and_clippy() {
        let mut found = complete();
        found.toolchain = Some("nightly".to_owned());
        found.debian_compiler = false;
        found.packages.remove("rust-web-clippy");
        assert_eq!(Plan::new(&found, Purpose::Lint), Plan::default());
    }

    #[test]
    fn debians_compiler_is_linked_where_it_is_installed_already() {
        let found = Found {
            toolchain: None,
            ..complete()
        };
        let expected = Plan {
            link_toolchain: true,
            ..Plan::default()
        };
        assert_eq!(Plan::new(&found, Purpose::Build), expected);
    }

    #[test]
    fn headers_are_not_asked_for_once_the_linker_is_built() {
        let mut found = complete();
        found.packages.remove("zlib1g-dev");
        assert_eq!(Plan::new(&found, Purpose::Build), Plan::default());
        found.linker = false;
        let plan = Plan::new(&found, Purpose::Build);
        assert_eq!(plan.package_names(), ["zlib1g-dev"]);
        assert!(plan.install_linker);
    }

    #[test]
    fn only_the_lints_need_clippy() {
        let mut found = complete();
        found.packages.remove("rust-web-clippy");
        found.missing_components = vec!["clippy"];
        assert_eq!(Plan::new(&found, Purpose::Build), Plan::default());
        let plan = Plan::new(&found, Purpose::Lint);
        assert_eq!(plan.package_names(), ["rust-web-clippy"]);
        assert_eq!(plan.components, ["clippy"]);
    }

    #[test]
    fn only_the_bench_needs_its_peers() {
        let mut found = complete();
        for peer in PEERS {
            found.packages.remove(peer.package);
        }
        found.fail2ban = false;
        assert_eq!(Plan::new(&found, Purpose::Build), Plan::default());
        assert_eq!(Plan::new(&found, Purpose::Lint), Plan::default());
        let plan = Plan::new(&found, Purpose::Bench);
        assert_eq!(plan.package_names(), ["xdp-tools", "nftables", "ethtool"]);
        assert!(plan.install_fail2ban);
    }

    #[test]
    fn the_list_says_what_and_why() {
        let found = Found {
            linker: false,
            ..complete()
        };
        assert_eq!(
            Plan::new(&found, Purpose::Build).to_string(),
            "  cargo    bpf-linker 0.13.0        links the kernel program; a minute's build into target/tools\n"
        );
    }
}
