"""A report's origin checked with plain arithmetic: DER by hand, RSA and P-384 on Python's integers.

Slow and obvious; shares nothing with the library, numbers included. Says why evidence is refused, or its product.
"""

import hashlib
from datetime import UTC, datetime

P = 2**384 - 2**128 - 2**96 + 2**32 - 1
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
B = 0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF
G = (
    0xAA87CA22BE8B05378EB1C71EF320AD746E1D3B628BA79B9859F741E082542A385502F25DBF55296C3A545E3872760AB7,
    0x3617DE4A96262C6F5D9E98BF9292DC29F8F41DBD289A147CE9DA3113B5F0B8C00A60B1CE1D7E819D7A431D7C90EA0E5F,
)
OID = "1.3.6.1.4.1.3704.1."
LEVELS = {
    0: ["3.1", "3.2", "3.4", "3.5", "3.6", "3.7", "3.3", "3.8"],
    1: ["3.9", "3.1", "3.2", "3.3", "3.5", "3.6", "3.7", "3.8"],
}


class Bad(Exception):
    """Why the evidence is refused."""


def need(met: object, why: str) -> None:
    if not met:
        raise Bad(why)


def items(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """Tag, content and whole of each DER element, one behind the other."""
    found, at = [], 0
    while at < len(data):
        need(at + 2 <= len(data), "DER cut short")
        start, size, at = at, data[at + 1], at + 2
        if size >= 0x80:
            count = size - 0x80
            size, at = int.from_bytes(data[at : at + count], "big"), at + count
        need(at + size <= len(data), "DER too long")
        found.append((data[start], data[at : at + size], data[start : at + size]))
        at += size
    return found


class Cert:
    """The fields of an X.509 certificate."""

    def __init__(self, der: bytes) -> None:
        ((outer, body, whole),) = items(der)
        need(whole == der, "DER with a tail")
        (first, tbs, self.tbs), (second, _, algorithm), (third, signature, _) = items(body)
        need((outer, first, second, third) == (0x30, 0x30, 0x30, 3) and signature[0] == 0, "outer form")
        version, serial, inner, issuer, validity, subject, spki, extensions = items(tbs)
        need(version[1] == b"\2\1\2" and inner[2] == algorithm, "version or algorithm")
        self.algorithm, self.signature, self.serial = algorithm, signature[1:], serial[1]
        self.issuer, self.subject = name(issuer[1]), name(subject[1])
        self.begins, self.ends = (moment(value) for _, value, _ in items(validity[1]))
        self.key = items(spki[1])[1][1][1:]
        self.extensions: dict[str, bytes] = {}
        for _, extension, _ in items(items(extensions[1])[0][1]):
            parts = items(extension)
            oid = dotted(parts[0][1])
            need(oid not in self.extensions, "extension twice")
            self.extensions[oid] = parts[-1][1]


def dotted(oid: bytes) -> str:
    arcs, value = [oid[0] // 40, oid[0] % 40], 0
    for byte in oid[1:]:
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            arcs.append(value)
            value = 0
    return ".".join(map(str, arcs))


def name(rdns: bytes) -> list[tuple[str, bytes]]:
    pairs = [items(items(rdn)[0][1]) for _, rdn, _ in items(rdns)]
    return [(dotted(oid[1]), value[1]) for oid, value in pairs]


def amd(common_name: str) -> list[tuple[str, bytes]]:
    values = ["Engineering", "US", "Santa Clara", "CA", "Advanced Micro Devices", common_name]
    return list(
        zip(["2.5.4.11", "2.5.4.6", "2.5.4.7", "2.5.4.8", "2.5.4.10", "2.5.4.3"], map(str.encode, values), strict=True)
    )


def moment(text: bytes) -> datetime:
    century = "" if len(text) == 15 else "20"
    return datetime.strptime(century + text.decode(), "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def sha(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def pss(issuer: Cert, signature: bytes, message: bytes) -> bool:
    """RSASSA-PSS with SHA-384, a salt of 48 bytes and a key of 4096 bits with e = 65537."""
    n, e = (int.from_bytes(value, "big") for _, value, _ in items(items(issuer.key)[0][1]))
    need(n.bit_length() == 4096 and e == 65537, "RSA key")
    encoded = pow(int.from_bytes(signature, "big"), e, n).to_bytes(512, "big")
    masked, digest = encoded[:-49], encoded[-49:-1]
    stream = b"".join(sha(digest + i.to_bytes(4, "big")) for i in range(10))
    block = bytearray(a ^ b for a, b in zip(masked, stream, strict=False))
    block[0] &= 0x7F
    salt = bytes(block[-48:])
    whole = encoded[-1] == 0xBC and encoded[0] < 0x80 and block[:-48] == bytes(len(block) - 49) + b"\1"
    return whole and sha(bytes(8) + sha(message) + salt) == digest


Point = tuple[int, int] | None


def add(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    if a[0] == b[0]:
        if (a[1] + b[1]) % P == 0:
            return None
        slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, P)
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def times(k: int, point: Point) -> Point:
    total = None
    while k:
        total = add(total, point) if k & 1 else total
        point, k = add(point, point), k >> 1
    return total


def ecdsa(key: bytes, r: int, s: int, message: bytes) -> bool:
    need(len(key) == 97 and key[0] == 4, "EC point")
    x, y = int.from_bytes(key[1:49], "big"), int.from_bytes(key[49:], "big")
    need((y * y - x**3 + 3 * x - B) % P == 0, "point off the curve")
    if not (0 < r < N and 0 < s < N):
        return False
    inverse, digest = pow(s, -1, N), int.from_bytes(sha(message), "big")
    point = add(times(digest * inverse % N, G), times(r * inverse % N, (x, y)))
    return point is not None and point[0] % N == r


def product_by_cpuid(family: int, model: int) -> str:
    if family == 0x19:
        return "Milan" if model < 0x10 else "Genoa" if model < 0x20 or 0xA0 <= model < 0xB0 else "?"
    return "Turin" if family == 0x1A and model < 0x12 else "?"


def check(report: bytes, vek: bytes, intermediate: bytes, root: bytes, pinned: set[str], now: datetime) -> str:
    """The product line, or `Bad`: the order of a relying party, one paragraph a step."""
    version, policy = int.from_bytes(report[:4], "little"), int.from_bytes(report[8:16], "little")
    need(len(report) == 0x4A0 and 2 <= version <= 5, "version")
    need(policy >> 17 & 1 and policy < 1 << 26 and report[0x34:0x38] == b"\1\0\0\0", "policy or algorithm")
    flags = int.from_bytes(report[0x48:0x4C], "little")
    zero = [(0x4C, 0x50), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x208, 0x2A0), (0x330, 0x4A0), (0x18B, 0x1A0)]
    zero += [(0x188, 0x18B)] * (version == 2) + [(0x1F8, 0x208)] * (version < 5)
    need(flags < 32 and not any(any(report[a:b]) for a, b in zero), "reserved")
    kind = {0: "VCEK", 1: "VLEK"}.get(flags >> 2, "")
    need(kind, "signing key")

    need(hashlib.sha256(root).hexdigest() in pinned, "root")
    try:
        ark, ask, key = Cert(root), Cert(intermediate), Cert(vek)
    except (ValueError, IndexError) as error:
        raise Bad("certificate") from error
    for cert, issuer in ((ark, ark), (ask, ark), (key, ask)):
        need(pss(issuer, cert.signature, cert.tbs) and cert.begins <= now <= cert.ends, "signature or dates")
    line = key.issuer[-1][1].decode().removeprefix("SEV-").removeprefix("VLEK-")
    ask_name = f"SEV-{line}" if kind == "VCEK" else f"SEV-VLEK-{line}"
    need(ark.subject == ark.issuer == ask.issuer == amd(f"ARK-{line}"), "names above")
    need(ask.subject == key.issuer == amd(ask_name) and key.subject == amd(f"SEV-{kind}"), "names below")

    says = {oid.removeprefix(OID): value for oid, value in key.extensions.items()}
    struct = items(says["1"])[0][1][0]
    levels = [int.from_bytes(items(says.pop(level))[0][1], "big") for level in LEVELS[struct]]
    need(set(says) == {"1", "2", "4" if kind == "VCEK" else "5"}, "extensions")
    need(struct == (line == "Turin") and items(says["2"])[0][1].decode().split("-")[0] == line, "product")

    r, s = (int.from_bytes(report[at : at + 72], "little") for at in (0x2A0, 0x2E8))
    need(ecdsa(key.key, r, s, report[:0x2A0]), "signature")

    need(bytes(levels) == report[0x180:0x188], "TCB")
    chip = report[0x1A0:0x1E0]
    need(kind == "VLEK" or not any(chip) or says["4"].ljust(64, b"\0") == chip, "chip")
    need(version < 3 or product_by_cpuid(report[0x188], report[0x189]) == line, "CPUID")
    return line.lower()
