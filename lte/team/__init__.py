"""A worker that is several processes: one worker to the server, data-parallel within.

Process 0 leads: it alone has optimizer, heads' bookkeeping and state, and talks to the server. The others
follow: each holds the model, and in every local step

    1. is told of the step, and given what the step computes with (`mirror`): the parameters that are trained,
       and, after an update, base, merged factors and the rest of the model as well;
    2. computes the gradients of its share of the batch (`share`);
    3. adds them to the leader's, who clips, and steps by their mean.

So nothing that followers hold can differ from the leader's, on whatever device, and nothing of theirs is
to be saved: a new worker starts new ones. Beside followers that mirror the whole trainer, and step by
gradients that all have, this moves the same bytes (one reduction and one broadcast make one all-reduce),
takes less memory (they have no optimizer), and needs no arithmetic that is the same everywhere. What it
gives up is communication during the backward pass.

Orders go through a pipe, whose end a follower notices at once, also while the leader waits for the server;
tensors through a group of torch.distributed of the worker's own, never the default group.

    orders      what leader and followers say
    group       how tensors travel
    mirror      which do
    share       forward and backward passes of one process
    leader      starting, leading and ending the others
    follower    being one of them
"""

from lte.team.leader import Team
from lte.team.share import Own, Share, backward, device_of, with_heads

__all__ = ["Own", "Share", "Team", "backward", "device_of", "with_heads"]
