"""The faults that holoray answers for, and how: a row of the table in SECURITY.md each.

To add one: a line here, `@pytest.mark.fault("its name")` on the tests that prove it, and `make security`.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Fault(NamedTuple):
    """`name` is what marks say; `what` happens; `behaviour` is what a user gets."""

    name: str
    what: str
    behaviour: str


CATALOGUE: Final = (
    # -- bytes of a store or checkpoint --------------------------------------------------------------------
    Fault("truncated", "a file cut at any length", "a typed error before a weight is touched; `verify` names the file"),
    Fault("flipped", "a flipped bit anywhere", "`FormatError` or `IntegrityError`; `verify` names file and fragment"),
    Fault("mutated", "random damage, sealed again or not", "a typed error, or weights as the manifest describes them"),
    Fault("forged-xxh3", "other bytes of the same xxh3_64", "refused by sha256: over a network, and with `--expect`"),
    Fault("spliced", "a fragment in the place of another", "`IntegrityError`, within a model and between models"),
    Fault("replayed", "an older version, whole or in part", "parts never mix; a whole one is refused by `--expect`"),
    Fault("downgraded", "another digest, format or none", "refused: sha256 and this format, there is no other"),
    Fault("duplicated", "a fragment that comes twice", "counted and added once"),
    Fault("reordered", "fragments in any order", "the same bits"),
    Fault("missing", "fragments or files that are not there", "the quality that the rest has, or an error naming them"),
    Fault("malformed", "nonsense under true digests", "`FormatError`; what was loaded before stays usable"),
    Fault("bomb", "a payload that inflates, a size that lies", "refused within 64 MiB of memory and at once"),
    Fault("absurd-layout", "overlapping, gapped, overflowing offsets", "`FormatError` or `LimitError` before any read"),
    Fault("huge-count", "very many tensors or fragments", "linear time; limits are checked before memory is taken"),
    Fault("hostile-name", "`..`, NUL, ANSI, bidi, 1 MB, look-alikes", "names are keys, never paths; output is escaped"),
    Fault("code", "pickle, `eval` or a payload that is code", "nothing that is read is ever executed"),
    Fault("changing-file", "files cut, swapped or linked under a reader", "a typed error or the old bytes; no SIGBUS"),
    Fault("not-finite", "NaN, infinities, subnormal values", "every bit pattern survives; quality counts the finite"),
    Fault("odd-tensor", "any rank, dtype, order; nothing at all", "exact, or `FormatError` for a dtype without a name"),
    # -- the machine ----------------------------------------------------------------------------------------
    Fault("disk-full", "no room at any write", "`CapacityError`; the old file or store stays whole, no debris"),
    Fault("killed-encode", "SIGKILL or SIGINT during an encode", "the old store, the new one, or one that resumes"),
    Fault("two-writers", "two encodes into one store", "the second is refused while the first lives"),
    Fault("no-memory", "less memory than the weights need", "`CapacityError`, before anything is killed"),
    Fault("no-device-memory", "a GPU without room", "less at a time, the host, or `CapacityError`; none half written"),
    Fault("no-shared-memory", "a full /dev/shm", "`CapacityError` when the segment is reserved, never a SIGBUS"),
    # -- sources --------------------------------------------------------------------------------------------
    Fault("bad-server", "an HTTP server that breaks the rules", "`SourceError` that names it; the next answer counts"),
    Fault("hostile-server", "a server that stalls, drips or never ends", "`SourceError` in time, little memory"),
    Fault("bad-redirect", "a redirect into a private network, to a file, on and on", "`SourceError`; credentials stay"),
    Fault("dead-server", "a server that is killed in mid-answer", "`SourceError`; the load can go on later"),
    Fault("stranger", "somebody else asks what is served", "only files of the store, with the token; no paths told"),
    Fault("greedy-client", "clients that take all readers, or do not read", "others are refused; the server can end"),
    Fault("lying-source", "a source that gives wrong bytes", "read elsewhere; proven liars are not asked again"),
    Fault("slow-source", "a source that stalls", "asked for elsewhere too, within a budget; the first answer counts"),
    Fault("dying-source", "a source that breaks off or flaps", "the rest is read, there or elsewhere; others are kept"),
    Fault("no-source", "no source answers any more", "`SourceError` with each one's last error; the rest stays"),
    Fault("lost-share", "shares missing or damaged", "computed from any k of them; `holoray repair` puts them back"),
    Fault("forged-share", "a share that lies or is another's", "taken as missing; digests and the root decide"),
    Fault("killed-repair", "SIGKILL during a repair", "no worse than before; the next repair goes on"),
    Fault("leaked-secret", "credentials in a URI", "no message, log or metric shows them"),
    # -- actors ---------------------------------------------------------------------------------------------
    Fault("worker-killed", "a worker that dies or hangs", "its unfinished tasks are redone; the same bits"),
    Fault("coordinator-killed", "the coordinator dies", "it is restarted and asks the nodes what they hold"),
    Fault("collective-lost", "a device fails while all combine", "the others are told; slots then travel one by one"),
    Fault("node-lost", "a node goes", "only what no other node holds is read again"),
    Fault("stale-answer", "late or repeated answers of the dead", "refused by their epoch"),
    Fault("no-workers", "nobody left to work", "the last generation stays usable, `WorkerLostError` after a deadline"),
    Fault("orphans", "a driver or job that goes away", "its actors and shared memory go as well"),
)  # fmt: skip
