"""A run that has not begun, event by event: a server, one to ten thousand workers, and their links.

    fleet   the workers: classes of them, with links, machines, speeds and lifetimes
    fluid   what many use at once, link or cores
    links   what a connection carries
    world   the clock, and what things cost: as `lte plan` computes it
    server  rounds by the product's rules, and the CPU that they take
    worker  what a worker does with its time, and its deaths
    run     all together, and what it comes to
    tables  that for people and for scripts

Workers take T local steps, send, wait for the version that follows, and go on. The server decodes what has
come in the order in which it came, closes rounds as `server.rounds` does, merges and publishes. Transfers
share the server's link, and processes the cores of their machine; alone, a transfer takes as long as
`cost.transfer_s` says.

A worker that dies is missed after `server.silence_s`. When it is back it has its state: it sends again what
it had sent, if no version has followed, or else takes the whole model; it waits for the next round
unless the open one still waits for it. A worker that is late does what the product's does: it sends
in vain, then takes all versions that have come (with `train.overlap` the next one).

Not modelled: merging on arrival, evaluations, checkpoints, the journal's disk, the start of a run (all are
there and hold version 0), packets and other traffic. Each of K shards has a machine and a link of its own,
where those of `server.shards` share one, and 1 / K of the work, and how they agree takes no time.
A relay takes each update once for its workers and hands it on at once; uplinks stay the workers' own.
"""

from __future__ import annotations

from lte.simulate.fleet import Fleet, WorkerClass, read_fleet
from lte.simulate.run import Figures, simulate
from lte.simulate.tables import to_dict, to_text

__all__ = ["Figures", "Fleet", "WorkerClass", "read_fleet", "simulate", "to_dict", "to_text"]
