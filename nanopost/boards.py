"""TensorBoard and Weights & Biases: what metrics.jsonl has, under the names that TRL's runs have
there, so that the curves of both can be overlaid.

Neither package is imported unless it is asked for.
"""

import importlib.util
import shutil
import sys
import time
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
            if asked and not _is_installed(package):
                raise InputError(
                    f"--{package} needs the package {package}: pip install {package}, or leave out "
                    "the flag."
                )

    def connect(self, arguments: dict, resumed: bool):
        """Open them, on the rank that writes alone. InputError for one that does not start, which
        leaves what is in the folder as it was: so before anything there is replaced."""
        if self.tensorboard:
            self.open.append(TensorBoard(self.out / "tensorboard"))
        if self.project:
            self.open.append(WandB(self.out, self.project, arguments, resumed))

    @property
    def folders(self) -> set[str]:
        """Those in OUT that are in use already: a board removes what is old in its own."""
        return {board.folder.name for board in self.open}

    @property
    def where(self) -> str:
        """Where they are, for a person."""
        return ", ".join(board.where for board in self.open)

    def start(self, lines: list[dict], alarms: list[dict]) -> str:
        """Show what a resumed run has logged so far, as far as a board does not have it. What it
        has of later steps is removed. -> what a person should know, or ""."""
        return self._each(lambda board: board.start(lines, alarms))

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


def _is_installed(package: str) -> bool:
    """Not merely a folder of that name, such as W&B's own, wandb/, in the working directory."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.loader is not None


class TensorBoard:
    """Its folder is written anew at every start, from the logs: it may have been off in between."""

    name = "TensorBoard"

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # whatever a package raises that does not fit the others
            raise InputError(
                f"--tensorboard: the package tensorboard cannot be imported ({error}): reinstall "
                "it, or leave out the flag."
            ) from error
        self.writer_of, self.writer = SummaryWriter, None
        self.folder, self.where = folder, f"tensorboard --logdir {folder}"

    def start(self, lines, alarms):
        shutil.rmtree(self.folder, ignore_errors=True)
        # purge_step: a TensorBoard that is running forgets what it has read.
        self.writer = self.writer_of(str(self.folder), purge_step=0)
        began = time.time() - (lines[-1].get("time/elapsed", 0.0) if lines else 0.0)
        for line in lines:
            self._add(line["step"], line, began + line.get("time/elapsed", 0.0))
        for alarm in alarms:
            self.alarm(alarm["step"], alarm["alarm"], alarm["message"])
        self.writer.flush()

    def log(self, step, metrics):
        self._add(step, metrics, time.time())
        self.writer.flush()

    def _add(self, step, metrics, at):
        for metric, value in metrics.items():
            if metric != "step":
                self.writer.add_scalar(name_of(metric), value, step, walltime=at)

    def alarm(self, step, name, message):
        self.writer.add_text(f"alarms/{name}", message, step)
        self.writer.flush()

    def close(self, failed):
        if self.writer:
            self.writer.close()


class WandB:
    """One run on W&B, whose id is in OUT/wandb/id.

    Online, a resumed run goes on under its id after the last step that W&B has, and W&B keeps what
    it has of steps that are repeated. Offline, where nothing has left the machine, the file is
    written anew from the logs.
    """

    name = "W&B"

    def __init__(self, out, project, arguments, resumed):
        import wandb

        self.folder, self.resumed, known = out / "wandb", resumed, None
        if resumed and (self.folder / "id").exists():
            known = (self.folder / "id").read_text(encoding="utf-8")
        before = set(self.folder.iterdir()) if self.folder.exists() else None
        self.folder.mkdir(parents=True, exist_ok=True)
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
        except BaseException as error:
            self._remove_new(before)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            raise InputError(
                f"--wandb {project}: wandb does not start ({error}): run `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error
        finally:
            sys.excepthook = hook  # dist's, which prints one sentence
        self.here = Path(self.run.dir).parent.resolve()
        self.where = self.run.url or "W&B (disabled)"
        if self.run.offline:
            self.where = str(Path(self.run.dir).parent)

    def _remove_new(self, before):
        """What a start that failed has left: the next would take it for another's."""
        if before is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in set(self.folder.iterdir()) - before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def start(self, lines, alarms):
        (self.folder / "id").write_text(self.run.id, encoding="utf-8")
        old = []
        if not self.resumed:  # of the run that this one replaces
            old = self.folder.glob("*run-*")
        elif self.run.offline:
            old = self.folder.glob("offline-run-*")
        for path in old:
            if path.resolve() != self.here:
                shutil.rmtree(path, ignore_errors=True)
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)
        begins = self.run.step  # after the last one that W&B has; 0 offline
        for line in lines:
            if line["step"] >= begins:
                self.log(line["step"], line)
        for alarm in alarms:
            if alarm["step"] >= begins:
                self.alarm(alarm["step"], alarm["alarm"], alarm["message"])

    def log(self, step, metrics):
        shown = {name_of(metric): x for metric, x in metrics.items() if metric != "step"}
        self.run.log({**shown, STEP: step}, step=step)

    def alarm(self, step, name, message):
        self.run.alert(title=name, text=f"step {step}: {message}", wait_duration=0)

    def close(self, failed):
        self.run.finish(exit_code=int(failed))
