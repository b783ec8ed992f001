"""TensorBoard and Weights & Biases: what metrics.jsonl has, under the names that TRL's runs have
there, so that curves of both lie on one another.

Neither package is imported unless it is asked for.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from nanopost import InputError

STEP = "train/global_step"  # the axis of transformers' Trainer


def name_of(metric: str) -> str:
    """As transformers' Trainer renames it: eval/... stays, all else goes to train/..."""
    return metric if metric.startswith("eval/") else f"train/{metric}"


class Boards:
    """The boards of a run, and none without flags. A board that fails is left out from then on."""

    def __init__(self, out, tensorboard: bool = False, project: str | None = None):
        """InputError if a package is missing."""
        self.out, self.tensorboard, self.project = Path(out), tensorboard, project
        self.open = []
        for asked, package in ((tensorboard, "tensorboard"), (project, "wandb")):
            if asked and importlib.util.find_spec(package) is None:
                raise InputError(
                    f"--{package} needs the package {package}: pip install {package}, or leave out "
                    "the flag."
                )

    def start(self, arguments: dict, resumed_at: int | None, lines: list[dict]) -> str:
        """Open them -> where they are, for a person. On the rank that writes alone.

        resumed_at: the step that a resumed run begins after; what was shown of later steps is
        removed. lines: what metrics.jsonl holds, for a board that has not seen it.
        """
        if self.tensorboard:
            self.open.append(TensorBoard(self.out / "tensorboard", resumed_at, lines))
        if self.project:
            self.open.append(WandB(self.out, self.project, arguments, resumed_at, lines))
        return ", ".join(board.where for board in self.open)

    def log(self, step: int, metrics: dict[str, float]) -> str:
        """-> what a person should know, or ""."""
        return self._each(lambda board: board.log(step, metrics))

    def alarm(self, step: int, name: str, message: str) -> str:
        return self._each(lambda board: board.alarm(step, name, message))

    def close(self, failed: bool = False) -> str:
        said = self._each(lambda board: board.close(failed))
        self.open = []
        return said

    def _each(self, do) -> str:
        said = []
        for board in list(self.open):
            try:
                do(board)
            except Exception as error:  # a board is no reason for a run to end
                self.open.remove(board)
                said.append(
                    f"warning: {board.name} has failed and is left out from here on "
                    f"({type(error).__name__}: {error}); metrics.jsonl has everything."
                )
        return "\n".join(said)


class TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder, resumed_at, lines):
        from torch.utils.tensorboard import SummaryWriter

        seen = folder.exists()
        purge = resumed_at + 1 if seen and resumed_at is not None else None
        self.writer = SummaryWriter(str(folder), purge_step=purge)
        self.where = f"tensorboard --logdir {folder}"
        if not seen:
            for line in lines:
                self.log(line["step"], line)

    def log(self, step, metrics):
        for metric, value in metrics.items():
            if metric != "step":
                self.writer.add_scalar(name_of(metric), value, step)
        self.writer.flush()

    def alarm(self, step, name, message):
        self.writer.add_text(f"alarms/{name}", message, step)
        self.writer.flush()

    def close(self, failed):
        self.writer.close()


class WandB:
    """One run on W&B, whose id is in OUT/wandb/id.

    Online, a resumed run goes on under its id; W&B keeps what it has of steps that are repeated.
    Offline, where nothing has left the machine, the file is written anew from metrics.jsonl.
    """

    name = "W&B"

    def __init__(self, out, project, arguments, resumed_at, lines):
        import wandb

        folder, known = out / "wandb", None
        if resumed_at is not None and (folder / "id").exists():
            known = (folder / "id").read_text(encoding="utf-8")
        folder.mkdir(exist_ok=True)
        online = wandb.setup().settings.mode not in ("offline", "dryrun")
        hook = sys.excepthook
        try:
            self.run = wandb.init(
                project=project,
                dir=str(out),
                name=str(out),
                id=known,
                resume="allow" if online else None,
                config=arguments,
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:
            raise InputError(
                f"--wandb {project}: wandb does not start ({error}): run `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error
        sys.excepthook = hook  # dist's, which prints one sentence
        (folder / "id").write_text(self.run.id, encoding="utf-8")
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)
        offline, here = self.run.offline, Path(self.run.dir).parent
        self.where = str(here) if offline else self.run.url or "W&B (disabled)"
        if offline:
            for other in folder.glob("offline-run-*"):
                if other.resolve() != here.resolve():
                    shutil.rmtree(other)
        if offline or known is None:
            for line in lines:
                self.log(line["step"], line)

    def log(self, step, metrics):
        shown = {name_of(metric): x for metric, x in metrics.items() if metric != "step"}
        self.run.log({**shown, STEP: step}, step=step)

    def alarm(self, step, name, message):
        self.run.alert(title=name, text=f"step {step}: {message}", wait_duration=0)

    def close(self, failed):
        self.run.finish(exit_code=int(failed))
