"""What the server and the workers of a recipe do, and whoever uses the result afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lte import config, diagnostics, ranks, signals
from lte.config import Override, Recipe
from lte.errors import ConfigError, JoinAnewError, RefusedError, RunError, StoppedError
from lte.lowrank import seed_of
from lte.models import taken, weights
from lte.nested import Cuts
from lte.nn import describe, plan, rehearse
from lte.server import Server, assembly, checkpoint, rollback
from lte.server.checkpoint import version_of
from lte.server.master import Master
from lte.server.shards import folder_of
from lte.tasks import AnyTask, task_of, try_out
from lte.team import Own, Share, Team, device_of, with_heads
from lte.worker import Worker
from lte.worker.session import Session
from lte.worker.trainer import materialize


def load(
    path: str | Path, overrides: Sequence[str] = (), *, say: Callable[[str], None] = lambda line: None
) -> Recipe:
    """A recipe as `config.load` reads it; where it starts from a checkpoint and leaves the settings of its
    model of transformers out, with those of the checkpoint.

    Args:
        say: prints a line for a person, if settings were taken.

    Raises:
        ConfigError: see there; or it names settings that are not the checkpoint's. UserError: transformers
            is not installed.
    """

    def complete(tree: dict[str, Any]) -> list[str]:
        if not taken.leaves_out(tree.get("model")):
            return []
        model: dict[str, Any] = tree["model"]
        data, run = (section if isinstance(section := tree.get(key), dict) else {} for key in ("data", "run"))
        kind, folder = str(data.get("kind", "text")), Path(str(run.get("dir", Recipe().run.dir)))
        path, begun = Path(model["init_from"]), None
        if run.get("resume") != "never" and checkpoint.versions(folder / "checkpoints"):
            begun = recipe_of(folder)
        if begun is not None and begun.model.init_from == model["init_from"]:
            # Its checkpoint may be gone, or another by now: what was taken then is the run's.
            found = taken.from_recipe(begun.model, kind, folder)
        elif _is_run(path):
            if (other := recipe_of(path).model).name != "transformers":
                return []
            found = taken.from_recipe(other, kind, path)
        elif (path / taken.CONFIG).is_file():
            found = taken.from_folder(path, kind)
        else:
            return []
        return taken.complete(tree, found, say)

    return config.load(path, overrides, complete=complete)


def make_server(
    recipe: Recipe,
    *,
    display: bool = True,
    announce: Callable[[str], None] | None = None,
    take_over: bool = False,
) -> Server:
    """A server that trains the recipe's model; see `lte.Server`.

    Raises:
        DataError: the data are missing or too few. ConfigError: they do not fit the model, nor its heads the
        batch, or it cannot be trained, or `train.method` has no server.
    """
    if recipe.train.method == "ddp":
        raise ConfigError(["train.method: ddp has no server; use 'lte train', or set train.method=lte"])
    task = task_of(recipe)
    check_start(recipe)
    task.check_run()
    _check_slices(recipe, task)
    return Server(
        tried_start(recipe),
        recipe,
        evaluate=task.evaluate,
        display=display,
        announce=announce,
        take_over=take_over,
    )


def _check_slices(recipe: Recipe, task: AnyTask) -> None:
    """Refuse a model whose heads cannot share out what it gives them of a batch."""
    lora = recipe.as_built.lora
    if lora.num_slices == 1:
        return
    model, batch = task.build().train(), task.noise(recipe.train.batch_size, torch.device("meta"))
    decided = plan(model, lora, recipe.base.quant)
    # Fake tensors, as some models look at numbers where there are none unless they are traced.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rehearse(model, decided, lora.num_slices, lambda: task.loss(model, batch))


def work(
    server: str,
    *,
    worker_id: str = "",
    folder: Path | None = None,
    wait_s: float = 30.0,
    key: str | Path | None = None,
    server_key: str | Path | None = None,
    shards: str | None = None,
    rank: int = 0,
    heads: int = 0,
    scale: float = 0.0,
    processes: int = 0,
    local_number: int = 0,
    recipe: Recipe | None = None,
    say: Callable[[str], None] = print,
    began: Callable[[Worker], object] = lambda worker: None,
) -> None:
    """Join a server and train the model of its recipe until the run ends, or a signal or `Worker.stop`
    ends this worker. One that was silent for so long that another was given its part of the data joins
    anew, for another part.

    Args:
        folder: of this worker's state; see `lte.Worker`.
        key, server_key: files of keys, for a server that has some; see `lte.Worker`.
        shards: folder of the training data, where it is not at the recipe's path on this machine.
        rank, heads: train heads of this lora_rank, and so many, at most. scale: of this lora_scale in every
            module. 0: the recipe's.
        processes: that this worker is, with this one, each with a share of every batch; 0: as many as the
            recipe says. local_number: of this worker among those on this machine, which the machine's GPUs
            are shared out among.
        recipe: refuse a server that trains another model than this one's.
        say: prints a line for a person. began: called with the worker before its first step.

    Raises:
        ConnectError, RefusedError, RunEnded: see `lte.Worker`. DataError: no data here. Ended: by a
        signal; what is to be saved is. ProcessError: one of the worker's processes has ended.
    """
    described = describe(with_heads(recipe, rank, heads, scale)) if recipe else None
    while True:
        with Session(
            server,
            worker_id=worker_id,
            model=described,
            heads=heads,
            rank=rank,
            scale=scale,
            folder=folder,
            wait_s=wait_s,
            key=key,
            server_key=server_key,
            say=say,
        ) as session:
            welcome = session.welcome
            given = config.from_dict(welcome.settings)
            differing = config.differences(recipe or given, given, ("model", "lora", "base"))
            # Where weights come from is the server's affair: a worker is given what they are.
            if differs := [line for line in differing if not line.startswith("model.init_")]:
                raise RefusedError(
                    f"it trains another model ({differs[0]})",
                    "give its recipe, or none to take it from there",
                )
            if shards is not None:
                given = config.replace(given, **{"data.shards": shards})
            task_of(given).check()
            pieces = f", in {given.train.accumulate} pieces" if given.train.accumulate > 1 else ""
            num_slices = given.lora.capped(rank, heads).num_slices
            if heads and given.train.batch_size % (num_slices * given.train.accumulate):
                batch = f"the recipe's batches of {given.train.batch_size}{pieces}"
                raise ConfigError([f"--heads: {heads} heads cannot share {batch} equally"])
            num = processes or given.worker.processes
            samples = given.train.batch_size // (num_slices * given.train.accumulate)
            if samples % num:
                of_a_head = " of a head" if num_slices > 1 else ""
                raise ConfigError(
                    [
                        f"--processes: {num} cannot share the {samples} samples{of_a_head} of the recipe's"
                        f" batches of {given.train.batch_size}{pieces} equally"
                    ]
                )
            say(f"{welcome.worker_id} joined {server} at version {welcome.version}")
            own = Own(welcome.slot, rank, heads or given.lora.heads, scale)
            device = device_of(given, local_number * num)
            try:
                with Team(given, num, own, number=local_number, stop=session.stop) as team:
                    share = Share(given, device, own, processes=num)
                    team.meet()
                    _train(session, given, team, share, say, began)
                return
            except JoinAnewError as error:
                say(f"{error.reason}; joining anew")


def _train(
    session: Session,
    recipe: Recipe,
    team: Team,
    share: Share,
    say: Callable[[str], None],
    began: Callable[[Worker], object],
) -> None:
    """Train for the server that a session has joined.

    Args:
        recipe: the server's. team, share: all processes of this worker, and what this one does of it.
    """
    # What a model draws in its forward pass, such as dropout, is another's on every worker, and repeats
    # itself where a worker has a process of its own.
    torch.manual_seed(seed_of(recipe.run.seed, "forward", session.welcome.slot))
    try:
        worker, ended_by = Worker(share.model, session, say=say), list[int]()
    except StoppedError:  # it waited for the first round, and the team had it wait no more
        team.check()
        raise

    def stop(number: int) -> None:
        ended_by.append(number)
        worker.stop()

    team.call_when_lost(worker.stop)
    began(worker)
    with signals.told(stop):
        goes_on = not worker.done
        while goes_on:
            team.lead(worker.trainer)
            loss, tokens = share.backward(worker.step_index)
            goes_on = worker.step(team.mean(worker.trainer, loss), tokens=tokens)
    if not worker.done:
        team.check()
    say(f"{worker.worker_id} {'finished' if worker.done else 'stopped'} at version {worker.version}")
    if session.num_damaged:
        say(f"{session.num_damaged} messages were damaged on their way, and dropped")
    if ended_by and not worker.done:
        raise signals.Ended(ended_by[0])


def initial_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with its initial weights, a function of `run.seed`."""
    task = task_of(recipe)
    model = materialize(task.build(), torch.device("cpu"))
    task.initialize(model, recipe.run.seed)
    return model


def starting_model(recipe: Recipe) -> nn.Module:
    """The model that this recipe's run starts from: `initial_model`, or with the weights of
    `model.init_from`, which are read one at a time into a model that had no memory before. A run that has
    begun needs these no more.

    Raises:
        ConfigError: they are not the model's; nothing is built before config.json or the recipe of a run has
            been compared. RunError: of a run that has none. UserError: transformers is not installed.
    """
    if recipe.model.init_from is None or _has_begun(recipe):
        return initial_model(recipe)
    return _read_start(recipe)


def _read_start(recipe: Recipe) -> nn.Module:
    """The model with the weights of `model.init_from` as they are there now, whatever has begun."""
    assert recipe.model.init_from is not None
    task, path = task_of(recipe), Path(recipe.model.init_from)
    _compare_start(recipe)
    model = task.build()
    if _is_run(path):
        weights.check(model, weights.of_memory(dict(task_of(recipe_of(path)).build().state_dict())), path)
        found = weights.of_memory(dict(load_run(path, recipe.model.init_weights)[0].state_dict()))
    else:
        found = weights.read(recipe.model, recipe.data.kind, path, model)
    weights.check(model, found, path)
    weights.start_buffers(model)
    weights.fill(model, found)
    return model


def tried_start(recipe: Recipe) -> Callable[[], nn.Module]:
    """What builds the model that this recipe's run starts from, as `starting_model` does. If it is one of
    transformers and the run is new, that one was built and tried out before.

    Raises:
        ConfigError: it cannot be trained, see `try_out`; or see `starting_model`. RunError, UserError: see
            there.
    """
    has_begun = _has_begun(recipe)
    if recipe.model.name != "transformers" or (has_begun and recipe.run.resume != "never"):
        return lambda: starting_model(recipe)
    num_threads = torch.get_num_threads()
    if recipe.server.shards > 1:
        torch.set_num_threads(1)  # the other shards are forked, where a pool of threads would be missing
    try:
        # What a run that is moved aside only later started from is not to be read here.
        model = initial_model(recipe) if has_begun else starting_model(recipe)
        try_out(model, recipe)
    finally:
        torch.set_num_threads(num_threads)
    held = [] if has_begun else [model]
    return lambda: held.pop() if held else starting_model(recipe)


def check_start(recipe: Recipe) -> None:
    """Refuse a folder of `model.init_from` that is of another model by its config.json, before anything is
    built.

    Raises:
        ConfigError: it is. UserError: transformers is not installed.
    """
    if not _has_begun(recipe):
        _compare_start(recipe)


def _compare_start(recipe: Recipe) -> None:
    """`check_start`, whatever has begun."""
    path = recipe.model.init_from
    if path is not None and not _is_run(Path(path)):
        weights.compare(recipe.model, recipe.data.kind, Path(path))


def _has_begun(recipe: Recipe) -> bool:
    return bool(checkpoint.versions(Path(recipe.run.dir) / "checkpoints"))


def _is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def load_run(
    folder: Path, which: str = "published", rank: int | None = None
) -> tuple[nn.Module, Recipe, int]:
    """A trained model from a run folder.

    Args:
        which: `published` (what the workers hold), `master` (fp32) or `ema` (its average over versions).
        rank: cut nested heads to it, see `nested.Cuts`; None: leave them whole.

    Returns:
        The model in eval mode, the run's recipe and the version.

    Raises:
        RunError: the folder holds no run, a damaged one, one without the average, or without such ranks.
    """
    recipe = recipe_of(folder)
    if which == "ema" and rank is not None:
        raise RunError(f"{folder}: of the average over versions no head is known that could be cut to a rank")
    if rank is not None:
        model, master, version = _loaded(folder, recipe)
        cuts = Cuts(master)
        cuts.fill(model, which, cuts.at(rank))
        return model, recipe, version
    paths = assembly.newest(folder, recipe)
    model = initial_model(recipe)
    # One shard after another: a divided master may be too large for one process.
    for path, names in zip(paths, assembly.names(model, recipe) or [None], strict=True):
        master, version = _restored(model, recipe, *checkpoint.load(path), names)
        if which == "ema" and not master.ema.tensors:
            raise RunError(f"{folder}: keeps no average of its master; train with outer.ema=0.98, say")
        master.fill(model, which)
        del master
    return model.eval(), recipe, version


def find_ranks(
    folder: Path,
    which: str,
    *,
    tokens: int | None = None,
    shards: str | None = None,
    most_parameters: int | None = None,
    most_increase: float | None = None,
    say: Callable[[str], None] = print,
) -> tuple[ranks.Found, tuple[Override, ...]]:
    """The least ranks of a run's nested heads within a bound, and `lora.overrides` that say them.

    Args:
        which: `published` or `master` weights. tokens: of validation data in each evaluation; None:
            eval.tokens, 0: all. shards: folder of data, where they are not the run's.
        most_parameters, most_increase: see `ranks.search`.
        say: prints a line for a person.

    Raises:
        RunError: see `load_run`. DataError: no validation data.
    """
    recipe = recipe_of(folder)
    model, master, _ = _loaded(folder, recipe)
    if shards:
        recipe = config.replace(recipe, **{"data.shards": shards})
    task, cuts = task_of(recipe), Cuts(master)
    task.check()
    rungs = {name: cuts.rungs(name) for name in cuts.ranks}
    most_tokens = recipe.eval.tokens if tokens is None else tokens
    say(f"{folder}: {ranks.most_evaluations(rungs)} evaluations at most, of {len(rungs)} modules")

    def loss(chosen: ranks.Ranks) -> float:
        cuts.fill(model, which, chosen)
        with torch.no_grad():
            measured = task.evaluate(model, most_tokens).loss
        assert measured is not None
        return measured

    found = ranks.search(
        rungs, cuts.features, loss, most_parameters=most_parameters, most_increase=most_increase
    )
    return found, cuts.overrides(found.ranks)


def compare_updates(folder: Path, other: Path) -> dict[str, Tensor]:
    """How far the subspaces of two runs' updates W - W_0 overlap, module by module: the LoRA paper's section
    7.2, where two runs with heads of different rank are compared.

    Returns:
        By module that both adapt, `diagnostics.subspace_similarities` of the leading right singular vectors,
        (i, j): as many as the ranks of the two runs' heads. NaN where a run has not moved the module.

    Raises:
        RunError: see `load_run`; or no module is adapted by both in one shape, or W_0 is gone.
    """
    (one, ranks_one), (two, ranks_two) = _updates(folder), _updates(other)
    common = [name for name in one if name in two and one[name].shape == two[name].shape]
    if not common:
        raise RunError(f"{folder}, {other}: no module is adapted in both and has the same shape")
    found = {}
    for name in common:
        (u, i), (v, j) = (
            (diagnostics.singular(update), rank)
            for update, rank in ((one[name], ranks_one[name]), (two[name], ranks_two[name]))
        )
        similarity = diagnostics.subspace_similarities(u.right[:, :i], v.right[:, :j])
        has_moved = bool(u.values[0] > 0) and bool(v.values[0] > 0)
        found[name] = similarity if has_moved else torch.full_like(similarity, torch.nan)
    return found


def _updates(folder: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """W - W_0 of every adapted module of a run, (out, in); and ranks of heads, at most min(out, in)."""
    recipe = recipe_of(folder)
    _, master, _ = _loaded(folder, recipe)
    start = _start_of(folder, recipe)
    updates = {name: weight - start.weights[name] for name, weight in master.weights.items()}
    ranks = {name: min(spec.rank, *updates[name].shape) for name, spec in master.plan.adapted.items()}
    return updates, ranks


def _start_of(folder: Path, recipe: Recipe) -> Master:
    """The master at the version 0 of a run: of its checkpoint, where it is kept; else made again.

    Raises:
        RunError: the run started from weights that cannot be read any more.
    """
    holders = [folder_of(folder, shard) / "checkpoints" for shard in range(recipe.server.shards)]
    kept = [path for holder in holders for path in checkpoint.versions(holder) if not version_of(path)]
    if len(kept) == len(holders):
        master = Master(initial_model(recipe), recipe)
        master.load_state(assembly.joined([checkpoint.load(path)[1] for path in kept]))
        return master
    if recipe.model.init_from is None:
        return _master_at_start(initial_model(recipe), recipe)
    try:
        return _master_at_start(_read_start(recipe), recipe)
    except (ConfigError, RunError) as error:
        raise RunError(
            f"{folder}: what it started from is gone: its checkpoint of version 0 is not kept, and"
            f" {str(error).partition(chr(10))[0]}"
        ) from None


def _master_at_start(model: nn.Module, recipe: Recipe) -> Master:
    """Data-parallel runs go on from a model as it is, others from what is published of it."""
    master = Master(model, recipe)
    if recipe.train.method == "ddp":
        master.take(model, as_version=False)
    return master


def _loaded(folder: Path, recipe: Recipe) -> tuple[nn.Module, Master, int]:
    """A plain model in eval mode with its initial weights, and the master at the version of a run's newest
    checkpoint.

    Raises:
        RunError: the folder holds no checkpoint, or a damaged one.
    """
    progress, state = assembly.load(folder, recipe)
    model = initial_model(recipe)
    return model.eval(), *_restored(model, recipe, progress, state)


def _restored(
    model: nn.Module,
    recipe: Recipe,
    progress: checkpoint.Progress,
    state: Mapping[str, Mapping[str, Tensor]],
    names: Collection[str] | None = None,
) -> tuple[Master, int]:
    """The master of a checkpoint, of a whole model or of what has these names of it, and its version."""
    master = Master(model, recipe, names)
    master.enter(progress.version)
    master.load_state(state)
    return master, progress.version


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        RunError: the folder holds none.
    """
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder}: not a run folder (it has no config.yaml); give the run.dir of a run")
    return config.load(folder / "config.yaml")


def roll_back(folder: Path, version: int) -> rollback.RolledBack:
    """Bring a recipe's run back to a version; see `rollback.roll_back`."""
    recipe = recipe_of(folder)
    if recipe.train.method == "ddp":
        raise RunError(f"{folder}: a data-parallel run keeps no journal, by which to go back")
    if recipe.server.shards > 1:
        raise RunError(f"{folder}: a run with server.shards = {recipe.server.shards} cannot go back yet")
    return rollback.roll_back(folder, version, lambda recipe: Master(initial_model(recipe), recipe))
