//! The iptables back end: its programs, the kernel's modules, and Docker's chain.

use std::{fs, path::Path};

use super::{
    Check, Plan,
    command::{self, Trouble},
};

/// What the back end does, in a network namespace of its own that ends with it.
const TRIAL: &str = "set -e; ipset create P hash:net family $1 hashsize 1024 maxelem 16 timeout 0 counters; \
                     $2 -w 2 -N P; $2 -w 2 -A P -m set --match-set P src -j DROP; $2 -w 2 -I INPUT -j P";
const MODPROBE: &str = "`modprobe -a ip_set_hash_net xt_set iptable_filter ip6table_filter`; a kernel without them cannot do it";

pub(super) fn checks(plan: &Plan) -> Vec<Check> {
    if !plan.iptables {
        return vec![Check::skipped(
            "iptables",
            "that back end is not configured",
        )];
    }
    let version = command::run("iptables", &["--version"]);
    let flavour = version.as_ref().ok().map(|said| flavour(&said.out));
    let mut all = vec![
        iptables(plan, &version, &legacy_tables()),
        ipset(plan, &command::run("ipset", &["--version"])),
    ];
    let missing = all
        .iter()
        .any(|check| check.outcome != super::Outcome::Pass);
    all.push(if missing {
        Check::skipped("iptables trial", "needs both")
    } else {
        trial(plan)
    });
    all.push(docker(flavour));
    all
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flavour {
    Nft,
    Legacy,
}

/// `iptables v1.8.9 (nf_tables)`; older ones, without a word in brackets, are all legacy.
fn flavour(version: &str) -> Flavour {
    if version.contains("nf_tables") {
        Flavour::Nft
    } else {
        Flavour::Legacy
    }
}

/// Tables of the legacy flavour that the kernel has; asking iptables-legacy would make them.
fn legacy_tables() -> String {
    let v4 = fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    v4.split_whitespace().collect::<Vec<_>>().join(", ")
}

fn iptables(plan: &Plan, version: &Result<command::Said, Trouble>, legacy: &str) -> Check {
    let name = "iptables";
    match version {
        Err(Trouble::Missing) => Check::bad(
            plan.without_iptables,
            name,
            "not installed: nothing to fall back on",
            "apt-get install iptables",
        ),
        Err(trouble) => Check::bad(
            plan.without_iptables,
            name,
            trouble.to_string(),
            "see what `iptables --version` says",
        ),
        Ok(said) if !said.ok => Check::bad(
            plan.without_iptables,
            name,
            said.complaint(),
            "see what `iptables --version` says",
        ),
        Ok(said) => {
            let version = said.out.trim();
            match (flavour(version), legacy.is_empty()) {
                (Flavour::Nft, false) => Check::pass(
                    name,
                    format!(
                        "{version}; rules of the legacy flavour are there as well ({legacy}), and both are met by every packet"
                    ),
                ),
                _ => Check::pass(name, version),
            }
        }
    }
}

fn ipset(plan: &Plan, version: &Result<command::Said, Trouble>) -> Check {
    let name = "ipset";
    match version {
        Err(Trouble::Missing) => Check::bad(
            plan.without_iptables,
            name,
            "not installed: nothing to fall back on",
            "apt-get install ipset",
        ),
        Err(trouble) => Check::bad(
            plan.without_iptables,
            name,
            trouble.to_string(),
            "see what `ipset --version` says",
        ),
        // Says its version and goes on to fail where the kernel lacks the module.
        Ok(said) => match said.out.lines().next() {
            Some(version) if version.starts_with("ipset ") => Check::pass(name, version.trim()),
            _ => Check::bad(plan.without_iptables, name, said.complaint(), MODPROBE),
        },
    }
}

fn trial(plan: &Plan) -> Check {
    let name = "iptables trial";
    let mut families = vec![("inet", "iptables")];
    if Path::new("/proc/thread-self/net/if_inet6").exists() {
        families.push(("inet6", "ip6tables"));
    }
    for (family, program) in &families {
        match command::run(
            "unshare",
            &["--net", "--", "sh", "-c", TRIAL, "trial", family, program],
        ) {
            Ok(said) if said.ok => {}
            Ok(said) if said.err.contains("unshare") => {
                return Check::skipped(
                    name,
                    format!("no namespace to try it in: {}", said.complaint()),
                );
            }
            Err(trouble) => return Check::skipped(name, format!("unshare: {trouble}")),
            Ok(said) => {
                return Check::bad(
                    plan.without_iptables,
                    name,
                    format!("{program} with an ipset fails: {}", said.complaint()),
                    MODPROBE,
                );
            }
        }
    }
    let tried = if families.len() == 2 {
        "IPv4 and IPv6"
    } else {
        "IPv4; this kernel has no IPv6"
    };
    Check::pass(
        name,
        format!(
            "an ipset and a rule that uses it work ({tried}); tried in a namespace that is gone again"
        ),
    )
}

fn docker(flavour: Option<Flavour>) -> Check {
    let name = "Docker";
    match flavour {
        None => return Check::skipped(name, "cannot be looked for without iptables"),
        // iptables-legacy makes the table that it is asked about.
        Some(Flavour::Legacy) if !legacy_tables().contains("filter") => {
            return Check::pass(name, "no chain of it: there is no filter table yet");
        }
        Some(_) => {}
    }
    match command::run("iptables", &["-w", "2", "-S", "FORWARD"]) {
        Ok(said) if said.ok => chains(&said.out),
        Ok(said) => Check::skipped(
            name,
            format!("the chain FORWARD cannot be listed: {}", said.complaint()),
        ),
        Err(trouble) => Check::skipped(
            name,
            format!("the chain FORWARD cannot be listed: {trouble}"),
        ),
    }
}

fn chains(forward: &str) -> Check {
    let name = "Docker";
    let jumps = forward
        .lines()
        .any(|line| line.starts_with("-A FORWARD ") && line.trim_end().ends_with("-j DOCKER-USER"));
    if jumps {
        Check::pass(
            name,
            "its chain DOCKER-USER is there: with iptables, traffic to containers is guarded from it",
        )
    } else {
        Check::pass(
            name,
            "no chain of it: with iptables, forwarded traffic is guarded from FORWARD",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Outcome, *};
    use crate::{config::Config, doctor::command::Said};

    fn said(ok: bool, out: &str, err: &str) -> Said {
        Said {
            ok,
            out: out.into(),
            err: err.into(),
        }
    }

    #[test]
    fn flavours_are_told_apart() {
        assert_eq!(flavour("iptables v1.8.9 (nf_tables)\n"), Flavour::Nft);
        assert_eq!(flavour("iptables v1.8.9 (legacy)\n"), Flavour::Legacy);
        assert_eq!(flavour("iptables v1.6.1\n"), Flavour::Legacy);
    }

    #[test]
    fn what_is_missing_is_as_bad_as_what_is_left() {
        let fallback = Plan::new(&Config::default());
        let only = Plan::new(&Config::parse("[enforce]\nbackends = [\"iptables\"]").unwrap());
        for (plan, outcome) in [(&fallback, Outcome::Warn), (&only, Outcome::Fail)] {
            assert_eq!(iptables(plan, &Err(Trouble::Missing), "").outcome, outcome);
            assert_eq!(
                ipset(plan, &Err(Trouble::Failed("hung".into()))).outcome,
                outcome
            );
            assert_eq!(
                ipset(
                    plan,
                    &Ok(said(
                        false,
                        "",
                        "ipset v7.17: Cannot open session to kernel.\n"
                    ))
                )
                .outcome,
                outcome
            );
        }
        assert_eq!(
            ipset(
                &only,
                &Ok(said(false, "ipset v7.17, protocol version: 7\n", "x"))
            )
            .outcome,
            Outcome::Pass
        );
        let both = iptables(
            &only,
            &Ok(said(true, "iptables v1.8.9 (nf_tables)\n", "")),
            "filter",
        );
        assert!(
            both.outcome == Outcome::Pass && both.found.contains("legacy"),
            "{both:?}"
        );
    }

    #[test]
    fn docker_s_chain_is_seen_where_packets_are_sent_there() {
        let jumps = "-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-FORWARD\n";
        assert!(chains(jumps).found.contains("is there"));
        for none in [
            "-P FORWARD ACCEPT\n",
            "-N DOCKER-USER\n",
            "-A FORWARD -j DOCKER-USER-2\n",
            "\u{0}",
        ] {
            assert!(chains(none).found.contains("no chain"), "{none}");
        }
    }
}
