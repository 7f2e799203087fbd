//! Nginx's messages by syslog: can the agent listen for them, does Nginx send them there, and is there room for them?

use std::{net::SocketAddr, path::Path};

use super::{
    super::{Check, Outcome, Plan, place},
    Instance, Seen, choose, judge, of, seen,
};
use crate::source::syslog::{self, Listen};

/// Nginx sends no longer message by UDP.
const LONGEST_BY_UDP: usize = 64 * 1024;

pub(in super::super) fn checks(plan: &Plan) -> Vec<Check> {
    let listens = &plan.config.source.syslog;
    if listens.is_empty() {
        return Vec::new();
    }
    let seen = seen(plan);
    let is_unix = |listen: &Listen| matches!(listen, Listen::Unix(_));
    let mut all = Vec::new();
    if listens.iter().any(is_unix) {
        all.push(queue(syslog::can_wait()));
    }
    for listen in listens {
        let mut checks = match listen {
            Listen::Unix(path) => vec![unix(path, plan.config.source.syslog_group.as_deref())],
            Listen::Udp(_) => vec![udp(plan.config.source.limits.max_line)],
        };
        checks.extend(sent(plan, &seen, listen));
        let which = listen.to_string();
        all.extend(checks.into_iter().map(|check| of(check, &which)));
    }
    all
}

/// Is there room for messages at a Unix socket?
fn queue(can_wait: Option<u32>) -> Check {
    let name = "syslog queue";
    let enough = syslog::ENOUGH_WAITING;
    match can_wait {
        None => Check::skipped(name, "net.unix.max_dgram_qlen cannot be read"),
        Some(few) if few < enough => Check::warn(
            name,
            format!(
                "{few} messages can wait at a Unix socket (net.unix.max_dgram_qlen); what finds no room Nginx drops, and only \
                 its error log says so"
            ),
            format!(
                "`sysctl -w net.unix.max_dgram_qlen={enough}` before the agent starts, and a line in /etc/sysctl.d/ to keep it"
            ),
        ),
        Some(room) => Check::pass(name, format!("{room} messages can wait at a Unix socket")),
    }
}

fn unix(path: &Path, group: Option<&str>) -> Check {
    let keys = ["source.syslog", "source.syslog_group"];
    let check = place::socket_at("syslog socket", path, group, keys);
    if check.outcome != Outcome::Pass || group.is_some() {
        return check;
    }
    Check::warn(
        check.name,
        format!(
            "{}; only root may write to it, and Nginx's workers are not root as a rule",
            check.found
        ),
        "set source.syslog_group to the group of Nginx's workers (www-data on Debian)",
    )
}

fn udp(max_line: usize) -> Check {
    let longest = if max_line > LONGEST_BY_UDP {
        "; Nginx itself drops lines over 64 KiB, which source.max_line_bytes would allow"
    } else {
        ""
    };
    Check::pass("syslog", format!("by UDP, on loopback{longest}"))
}

/// Does an Nginx send there, and what the agent can read?
fn sent(plan: &Plan, seen: &[Seen], listen: &Listen) -> Vec<Check> {
    let target = format!("syslog:server={}", server(listen));
    match choose(seen, |instance, log| goes_to(instance, log, listen)) {
        None => vec![Check::skipped(
            "Nginx log",
            "no Nginx is running or installed here: whether one sends there is not known",
        )],
        Some((_, Err(problem))) => vec![Check::skipped(
            "Nginx log",
            format!("whether Nginx sends there is not known: {problem}"),
        )],
        Some((_, Ok((_, site)))) if site.ours.is_empty() => vec![Check::warn(
            "Nginx log",
            format!("no access_log that can be seen sends to {}", server(listen)),
            format!(
                "in http {{ }}: access_log {target} portcullis; then `nginx -t && nginx -s reload`; or correct source.syslog"
            ),
        )],
        Some((_, Ok((_, site)))) => judge(plan, &site, &target, false),
    }
}

/// As Nginx writes it.
fn server(listen: &Listen) -> String {
    match listen {
        Listen::Udp(address) => address.to_string(),
        Listen::Unix(path) => format!("unix:{}", path.display()),
    }
}

/// Does an `access_log` go where we listen?
fn goes_to(instance: &Instance, log: &str, listen: &Listen) -> bool {
    let Some(options) = log.strip_prefix("syslog:") else {
        return false;
    };
    let mut options = options.split(',');
    let Some(server) = options.find_map(|option| option.trim().strip_prefix("server=")) else {
        return false;
    };
    match listen {
        Listen::Unix(path) => server
            .strip_prefix("unix:")
            .is_some_and(|there| instance.is(there, path)),
        Listen::Udp(address) => is_address(server, *address),
    }
}

/// Nginx takes names, and leaves out syslog's own port.
fn is_address(server: &str, address: SocketAddr) -> bool {
    let loopback = if address.is_ipv4() {
        "127.0.0.1"
    } else {
        "[::1]"
    };
    let server = server.replacen("localhost", loopback, 1);
    [format!("{server}:514"), server]
        .iter()
        .any(|server| server.parse() == Ok(address))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{
        super::{Built, LOG_FORMAT, conf},
        *,
    };
    use crate::config::Config;

    fn plan(config: &str) -> Plan {
        Plan::new(&Config::parse(config).unwrap())
    }

    fn instance() -> Instance {
        Built::default().instance(Some(7), "/".into(), &[])
    }

    /// What is said of an Nginx with this configuration.
    fn judged(listen: &str, configuration: &str) -> Vec<Check> {
        let seen = [(
            instance(),
            conf::parse_text(configuration).map(|root| (root, 1)),
        )];
        sent(&plan(""), &seen, &listen.parse().unwrap())
    }

    #[test]
    fn nobody_listens_and_nothing_is_looked_at() {
        assert_eq!(checks(&plan("")), []);
    }

    #[test]
    fn each_place_has_its_checks_and_the_queue_is_one_for_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| format!("unix:{}/{name}", folder.path().display());
        let config = format!(
            "[source]\nlog = []\nsyslog = ['{}', '{}', 'udp:127.0.0.1:5514']",
            path("a"),
            path("b")
        );
        let all = checks(&plan(&config));
        let count = |name: &str| all.iter().filter(|check| check.name == name).count();
        assert_eq!(count("syslog queue"), 1, "{all:#?}");
        assert_eq!(count(&format!("syslog socket of {}", path("a"))), 1);
        assert_eq!(count(&format!("syslog socket of {}", path("b"))), 1);
        assert_eq!(count("syslog of udp:127.0.0.1:5514"), 1);
        assert_eq!(count("Nginx log of udp:127.0.0.1:5514"), 1);
    }

    #[test]
    fn a_short_queue_is_told_with_the_sysctl() {
        let short = queue(Some(syslog::ENOUGH_WAITING - 1));
        assert_eq!(short.outcome, Outcome::Warn);
        assert!(
            short
                .remedy
                .unwrap()
                .contains("net.unix.max_dgram_qlen=512")
        );
        assert_eq!(queue(Some(syslog::ENOUGH_WAITING)).outcome, Outcome::Pass);
        assert_eq!(queue(None).outcome, Outcome::Skipped);
    }

    #[test]
    fn a_socket_that_cannot_be_made_or_written_to_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/access.sock");
        let group = nix::unistd::Group::from_gid(0.into()).unwrap().unwrap();
        assert_eq!(unix(&path, Some(&group.name)).outcome, Outcome::Pass);
        let rootly = unix(&path, None);
        assert!(
            rootly.outcome == Outcome::Warn && rootly.found.contains("only root"),
            "{rootly:?}"
        );
        let unknown = unix(&path, Some("no-such-group"));
        assert!(
            unknown.outcome == Outcome::Fail
                && unknown.remedy.unwrap().contains("source.syslog_group")
        );
        fs::write(folder.path().join("new"), "").unwrap();
        assert_eq!(unix(&path, Some(&group.name)).outcome, Outcome::Fail);
        let file = unix(&folder.path().join("new"), None);
        assert!(
            file.outcome == Outcome::Fail && file.remedy.unwrap().contains("source.syslog"),
            "something else is there"
        );
    }

    #[test]
    fn what_udp_cannot_carry_is_told_where_it_matters() {
        assert!(udp(LONGEST_BY_UDP + 1).found.contains("64 KiB"));
        assert!(!udp(LONGEST_BY_UDP).found.contains("64 KiB"));
    }

    #[test]
    fn the_access_log_that_goes_there_is_found() {
        let udp = Listen::Udp("127.0.0.1:5514".parse().unwrap());
        let six = Listen::Udp("[::1]:514".parse().unwrap());
        let unix = Listen::Unix("/run/portcullis/access.sock".into());
        for (log, listen, expected) in [
            ("syslog:server=127.0.0.1:5514", &udp, true),
            (
                "syslog:facility=local7,server=127.0.0.1:5514,tag=x",
                &udp,
                true,
            ),
            ("syslog:server=localhost:5514", &udp, true),
            ("syslog:server=127.0.0.1", &udp, false),
            ("syslog:server=logs.example:5514", &udp, false),
            ("syslog:server=[::1]", &six, true),
            ("syslog:server=localhost", &six, true),
            (
                "syslog:server=unix:/run/portcullis/access.sock,nohostname",
                &unix,
                true,
            ),
            ("syslog:server=unix:/run/other.sock", &unix, false),
            ("syslog:server=127.0.0.1:5514", &unix, false),
            ("syslog:tag=x", &udp, false),
            ("/var/log/nginx/access.log", &udp, false),
        ] {
            assert_eq!(goes_to(&instance(), log, listen), expected, "{log}");
        }
    }

    #[test]
    fn what_nginx_sends_is_judged_like_a_log() {
        let listen = "udp:127.0.0.1:5514";
        let http = |log: &str| format!("http {{ {LOG_FORMAT} {log} server {{ listen 80; }} }}");
        let good = http("access_log syslog:server=127.0.0.1:5514,tag=nginx portcullis;");
        let outcomes = |checks: Vec<Check>| -> Vec<Outcome> {
            checks.iter().map(|check| check.outcome).collect()
        };
        assert_eq!(outcomes(judged(listen, &good)), [Outcome::Pass; 3]);
        let forgeable = good.replace("escape=json", "escape=none");
        assert_eq!(judged(listen, &forgeable)[1].outcome, Outcome::Fail);
        let none = judged(listen, &http("access_log /var/log/nginx/access.log;"));
        assert_eq!(outcomes(none.clone()), [Outcome::Warn]);
        assert!(
            none[0]
                .remedy
                .as_deref()
                .unwrap()
                .contains("access_log syslog:server=127.0.0.1:5514 portcullis;")
        );
        assert_eq!(outcomes(judged(listen, "http {")), [Outcome::Skipped]);
        let nobody = sent(&plan(""), &[], &listen.parse().unwrap());
        assert_eq!(outcomes(nobody), [Outcome::Skipped]);
    }
}
