"""The rules that container engines make for a bridge network, b's port 80 published as 8080.

Read from the kernel after the engines had made them, in a namespace of their own.
"""

DOCKER = """*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
-A DOCKER -d {b}/{bits} ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d {loopback} -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s {network} ! -o docker0 -j MASQUERADE
-A POSTROUTING -s {b}/{bits} -d {b}/{bits} -p tcp -m tcp --dport 80 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination {target}
COMMIT
"""
"""Of dockerd 20.10.24 (`--ipv6 --ip6tables`), and what it adds for a published port."""

PODMAN = """*filter
:NETAVARK_FORWARD - [0:0]
-A FORWARD -m comment --comment "netavark firewall plugin rules" -j NETAVARK_FORWARD
-A NETAVARK_FORWARD -d {network} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A NETAVARK_FORWARD -s {network} -j ACCEPT
COMMIT
*nat
:NETAVARK-1D8721804F16F - [0:0]
:NETAVARK-DN-1D8721804F16F - [0:0]
:NETAVARK-HOSTPORT-DNAT - [0:0]
:NETAVARK-HOSTPORT-MASQ - [0:0]
:NETAVARK-HOSTPORT-SETMARK - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A POSTROUTING -j NETAVARK-HOSTPORT-MASQ
-A POSTROUTING -s {network} -j NETAVARK-1D8721804F16F
-A NETAVARK-1D8721804F16F -d {network} -j ACCEPT
-A NETAVARK-1D8721804F16F ! -d {multicast} -j MASQUERADE
-A NETAVARK-DN-1D8721804F16F -s {network} -p tcp --dport 8080 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-1D8721804F16F -s {localhost} -p tcp --dport 8080 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-1D8721804F16F -p tcp --dport 8080 -j DNAT --to-destination {target}
-A NETAVARK-HOSTPORT-DNAT -p tcp --dport 8080 -j NETAVARK-DN-1D8721804F16F
-A NETAVARK-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A NETAVARK-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000
COMMIT
"""
"""Of netavark 1.4.0, with port 8080 published."""


def rules(engine: str, *, six: bool, network: str, b: str) -> str:
    """The input of iptables-restore --noflush, or ip6tables-restore, for b's address."""
    return {"docker": DOCKER, "podman": PODMAN}[engine].format(
        b=b,
        bits=128 if six else 32,
        network=network,
        loopback="::1/128" if six else "127.0.0.0/8",
        localhost="::1/128" if six else "127.0.0.1/32",
        multicast="ff00::/8" if six else "224.0.0.0/4",
        target=f"[{b}]:80" if six else f"{b}:80",
    )
