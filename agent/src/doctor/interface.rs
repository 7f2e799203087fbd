//! Each guarded interface: what it is, what its driver can, and who else is there.

use nix::errno::Errno;

use super::{Check, Plan, device, device::Device};
use crate::{
    enforce::{Backend, xdp::whose},
    host,
};

const UP: u32 = 1;

pub(super) fn checks(plan: &Plan) -> Vec<Check> {
    if !plan.xdp {
        return vec![Check::skipped(
            "interfaces",
            "no XDP back end is configured",
        )];
    }
    let interfaces = match plan.config.enforce.interfaces.as_slice() {
        [] => match host::default_interface() {
            Ok(interface) => vec![interface],
            Err(error) => {
                return vec![Check::bad(
                    plan.without_xdp,
                    "interfaces",
                    "no default route to take the interface from",
                    format!("{error:#}"),
                )];
            }
        },
        named => named.to_vec(),
    };
    interfaces
        .iter()
        .flat_map(|interface| one(plan, interface))
        .collect()
}

fn one(plan: &Plan, interface: &str) -> Vec<Check> {
    let device = match Device::read(interface) {
        Ok(device) => device,
        Err(Errno::ENODEV) => {
            return vec![Check::bad(
                plan.without_xdp,
                interface,
                "there is no such interface",
                "correct enforce.interfaces (`ip link` lists what is there)",
            )];
        }
        Err(error) => {
            return vec![Check::skipped(
                interface,
                format!("the kernel does not say what it is: {error}"),
            )];
        }
    };
    let mut all = vec![what(&device)];
    all.extend(not_ethernet(plan, &device));
    all.extend(layers(&device));
    if plan.config.enforce.backends.contains(&Backend::XdpNative) {
        all.push(native(&device));
    }
    all.push(occupied(plan, &device));
    all
}

fn what(device: &Device) -> Check {
    let link = &device.link;
    let mut parts = vec![if link.flags & UP == 0 { "down" } else { "up" }.to_owned()];
    parts.push(format!(
        "driver {}",
        device.made_by().unwrap_or("not known")
    ));
    parts.push(format!("MTU {}", link.mtu));
    match (device.channels, link.rx_queues) {
        (Some(channels), _) => parts.push(format!(
            "{} of {} queues in use",
            channels.now, channels.most
        )),
        (None, Some(queues)) => parts.push(format!("{queues} queues")),
        (None, None) => {}
    }
    let found = parts.join(", ");
    if link.flags & UP == 0 {
        Check::warn(
            &link.name,
            found,
            format!(
                "bring it up (`ip link set dev {} up`), or correct enforce.interfaces",
                link.name
            ),
        )
    } else {
        Check::pass(&link.name, found)
    }
}

fn not_ethernet(plan: &Plan, device: &Device) -> Option<Check> {
    (!device::is_ethernet(device.link.hardware)).then(|| {
        Check::bad(
            plan.harm,
            format!("{} frames", device.link.name),
            format!(
                "not Ethernet (type {}): the XDP program lets everything pass that it cannot read",
                device.link.hardware
            ),
            "guard the Ethernet interface below it, or set enforce.backends = [\"iptables\"]",
        )
    })
}

fn layers(device: &Device) -> Option<Check> {
    let name = format!("{} layers", device.link.name);
    let master = device.master.as_deref().unwrap_or("another interface");
    let lower = device.lower.as_deref().unwrap_or("the interface below it");
    match (
        device.link.member_of.as_deref(),
        device.link.kind.as_deref(),
    ) {
        (Some(kind @ ("bond" | "team")), _) => Some(Check::warn(
            name,
            format!(
                "a member of the {kind} {master}: what comes in through its other members is not seen"
            ),
            format!("guard {master}: enforce.interfaces = [{master:?}]"),
        )),
        (Some("bridge"), _) => Some(Check::pass(
            name,
            format!(
                "a port of the bridge {master}: what comes in through its other ports is not seen"
            ),
        )),
        (_, Some("bridge")) => Some(Check::warn(
            name,
            "a bridge: frames that it forwards to containers or guests never reach its XDP program",
            "guard the port that leads outside",
        )),
        (_, Some(kind @ ("vlan" | "macvlan" | "ipvlan"))) => Some(Check::warn(
            name,
            format!(
                "a {kind} interface: only the kernel's generic path has XDP there, which is slower"
            ),
            format!(
                "guard {lower}: enforce.interfaces = [{lower:?}]; the XDP program looks behind VLAN tags"
            ),
        )),
        (_, Some("team")) => Some(Check::warn(
            name,
            "a team: only the kernel's generic path has XDP there, which is slower",
            "use a bond, or guard the team's members",
        )),
        _ => None,
    }
}

fn native(device: &Device) -> Check {
    let name = format!("{} native XDP", device.link.name);
    let hindrances = device::hindrances(device);
    let driver = device.made_by().unwrap_or("the driver");
    let source = if device.features.is_some() {
        "the kernel says"
    } else {
        "by the list of known drivers"
    };
    match (device.has_native(), hindrances.is_empty()) {
        (Some(true), true) => Check::pass(name, format!("{driver} can do it ({source})")),
        (Some(true), false) => Check::warn(
            name,
            format!("{driver} can do it ({source}), but perhaps not as it is set up"),
            hindrances.join("; "),
        ),
        (None, false) => Check::warn(name, "not known whether it can", hindrances.join("; ")),
        (None, true) => Check::skipped(
            name,
            "not known whether it can; `portcullis load --interface …` tries it",
        ),
        (Some(false), _) => {
            let otherwise = "nothing, where the slower generic XDP is enough; else a network card with native XDP";
            let remedy = if hindrances.is_empty() {
                otherwise.to_owned()
            } else {
                hindrances.join("; ")
            };
            Check::warn(name, format!("{driver} cannot do it ({source})"), remedy)
        }
    }
}

fn occupied(plan: &Plan, device: &Device) -> Check {
    let interface = &device.link.name;
    let name = format!("{interface} XDP program");
    let own = whose::ours(&plan.config.enforce.pin_dir, interface);
    let programs = device.programs();
    if let (Some((id, place)), true) = (programs.first(), programs.len() == 1)
        && own == Some(*id)
    {
        return Check::pass(
            name,
            format!("{place}: Portcullis's own {}", device::program(*id)),
        );
    }
    let Some(holder) = device::holder(device) else {
        return Check::pass(name, "none is attached: the place is free");
    };
    let places: Vec<&str> = programs.iter().map(|(_, place)| *place).collect();
    let found = if places.is_empty() {
        holder
    } else {
        format!("{}: {holder}", places.join(" and "))
    };
    let is = |wanted: &str| {
        programs
            .iter()
            .any(|(id, _)| device::program_name(*id).as_deref() == Some(wanted))
    };
    let remedy = if is("xdp_dispatcher") {
        format!(
            "it is libxdp's, for other programs (`xdp-loader status {interface}`): Portcullis evicts nobody; unload it if it is not needed"
        )
    } else if is(portcullis_common::names::PROGRAM) {
        "Portcullis's, with another pin folder or loaded by hand: `portcullis detach` with the configuration that it was started with".to_owned()
    } else {
        format!(
            "Portcullis evicts nobody: if it is not needed, stop what has loaded it, or `ip link set dev {interface} xdp off` where no link holds it"
        )
    };
    Check::bad(
        plan.without_xdp,
        name,
        format!("taken by another: {found}"),
        remedy,
    )
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Outcome, netlink::Link},
        *,
    };
    use crate::config::Config;

    fn device(kind: Option<&str>, member_of: Option<&str>) -> Device {
        Device {
            link: Link {
                name: "dc0".into(),
                hardware: 1,
                flags: UP,
                mtu: 1500,
                kind: kind.map(str::to_owned),
                member_of: member_of.map(str::to_owned),
                ..Link::default()
            },
            master: member_of.map(|_| "up0".into()),
            lower: Some("low0".into()),
            ..Device::default()
        }
    }

    #[test]
    fn layers_are_told_with_what_to_guard_instead() {
        for (kind, member_of, outcome, expected) in [
            (None, Some("bond"), Outcome::Warn, "up0"),
            (None, Some("bridge"), Outcome::Pass, "up0"),
            (Some("vlan"), None, Outcome::Warn, "low0"),
            (Some("bridge"), None, Outcome::Warn, "port"),
            (Some("team"), None, Outcome::Warn, "bond"),
        ] {
            let check = layers(&device(kind, member_of)).unwrap();
            assert_eq!(check.outcome, outcome);
            assert!(format!("{check:?}").contains(expected), "{check:?}");
        }
        assert_eq!(layers(&device(Some("veth"), None)), None);
        assert_eq!(layers(&device(None, None)), None);
    }

    #[test]
    fn frames_that_are_not_ethernet_would_all_pass() {
        let plan = Plan::new(&Config::parse("mode = \"enforce\"").unwrap());
        let mut wireguard = device(Some("wireguard"), None);
        assert_eq!(not_ethernet(&plan, &wireguard), None);
        wireguard.link.hardware = 0xfffe;
        assert_eq!(
            not_ethernet(&plan, &wireguard).unwrap().outcome,
            Outcome::Fail
        );
    }

    #[test]
    fn what_is_down_is_said() {
        let mut down = device(None, None);
        assert_eq!(what(&down).outcome, Outcome::Pass);
        down.link.flags = 0;
        assert_eq!(what(&down).outcome, Outcome::Warn);
    }

    #[test]
    fn an_interface_that_is_not_there_is_a_failure_only_where_nothing_comes_after_it() {
        let mut config = Config::default();
        config.enforce.interfaces = vec!["no-such-iface".into()];
        assert_eq!(checks(&Plan::new(&config))[0].outcome, Outcome::Warn);
        config.enforce.backends = vec![Backend::XdpNative];
        assert_eq!(checks(&Plan::new(&config))[0].outcome, Outcome::Fail);
        config.enforce.backends = vec![Backend::Iptables];
        assert_eq!(checks(&Plan::new(&config))[0].outcome, Outcome::Skipped);
    }
}
