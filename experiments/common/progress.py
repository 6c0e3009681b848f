"""What a run prints: a header, a line that lives while it trains, and the evaluation's table."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from manako.agent.faults import ERRORS
from manako.agent.interfaces import GIVEN_UP, NOT_FIXED
from manako.agent.report.evaluation import CONDITIONS, Evaluation
from manako.agent.tuning.forgetting import Retention
from manako.envs import EpisodeVectorEnv
from manako.experiments.common.outcomes import measure_of, outcome_in_words, warnings_of
from manako.experiments.common.outlet import console_file
from manako.experiments.common.settings import PPOCommand
from manako.plain import printable
from manako.policies import VLMPolicy, parameter_table
from manako.policies.sensitivity import Sensitivity
from manako.spaces import actions_in_words

PLACES = ("iteration", "env_steps", "step", "examples")  # of a training


class PlainConsole(Console):
    """A console for which no text holds control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed, cells and titles of tables too, goes through here."""
        return super().render_str(printable(text), **options)


def plain_console() -> Console:
    """Prints what it is given: an action named [left] is no markup."""
    return PlainConsole(file=console_file(), soft_wrap=True, highlight=False, markup=False, emoji=False)


class Progress(TrainerCallback):
    """Live progress of training on a terminal; a line every few seconds where the output goes to a file.

    Args:
        run_dir: the run folder.
        command: the run's settings.
        policy: the policy.
        iterations: how many there will be.
        samples: env steps of an iteration.
        started: `time.perf_counter()` at the program's start.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(
        self, run_dir: Path, command: PPOCommand, policy: VLMPolicy, iterations: int, samples: int, started: float
    ) -> None:
        self.run_dir, self.command, self.policy = run_dir, command, policy
        self.iterations, self.samples, self.started = iterations, samples, started
        self.console = plain_console()
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._train_start = 0.0
        self._first_iteration = 0
        self._last_line = -1e9
        self._cut_told, self._given_up, self._faults = False, 0, 0

    def header(self, env: EpisodeVectorEnv, state: Sensitivity | None = None, seeds: str | None = None) -> None:
        """Prints what is about to run, and how far frame and instruction move the policy's state.

        The runner has already said where. `seeds` says that the environment ignores them.
        """
        played, workers, source = self.command.environment, self.command.workers, self.command.policy
        policy = self.policy
        instruction_from = "replaced" if played.instruction else "the env's own"
        self.console.print(
            f"environment  {played.env}, {played.num_envs} side by side, frames {env.frame_shape} "
            f"from {env.image_from}, "
            f"instruction {instruction_from}"
        )
        actions = actions_in_words(env.action_space, env.action_names)
        self.console.print(f"actions      {actions}; success: {env.success_rule}")
        self.console.print(f"episodes     {env.limit_from}")
        if env.gives_masks:
            self.console.print("masks        info['action_mask'] is obeyed: what it does not allow is never done")
        self.console.print(f"policy       {source.policy}, trainable: {source.trainable}")
        print_parts(self.console, policy)
        if workers.rollout_backend != "local":
            self.console.print(
                f"workers      {workers.workers} ({workers.rollout_backend}), {workers.worker_cpus:g} CPU and "
                f"{workers.worker_gpus:g} GPU each"
            )
        if seeds is not None:
            self.console.print(f"seeds        {seeds}")
        self.console.print("counted      episodes in the order of their starts, none before the first of all slots end")
        for heading, text in policy.describe():
            self.console.print(f"{heading:<13}{text}")
        if state is not None:
            print_sensitivity(self.console, state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._train_start = time.perf_counter()
        self._first_iteration = round(state.epoch or 0)
        if self.live:
            self.live.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows one iteration."""
        if not logs or "iteration" not in logs:
            return
        now = time.perf_counter()
        done = logs["iteration"] - self._first_iteration
        rate = done * self.samples / (now - self._train_start)
        left = (self.iterations - logs["iteration"]) * (now - self._train_start) / done
        success = "   -" if logs["success_rate"] is None else f"{logs['success_rate']:4.0%}"
        returned = "     -" if logs["episode_return"] is None else f"{logs['episode_return']:6.2f}"
        if logs.get(GIVEN_UP, 0) > self._given_up:
            self._given_up = logs[GIVEN_UP]
            self.console.print(
                f"replay       {self._given_up:.0f} episodes did not play again as they had: started anew"
            )
        if logs.get("env_faults", 0) > self._faults:
            self._faults = logs["env_faults"] * 2  # not each is worth a line
            self.console.print(
                f"warning: the environment broke {logs['env_faults']} times so far, and {logs['episodes_failed']} "
                f"episodes were lost with it, which are in no number: see {self.run_dir / ERRORS}"
            )
        if logs.get("whole_groups", 1) < 1 and not self._cut_told:
            self._cut_told = True
            self.console.print(
                f"warning: in {1 - logs['whole_groups']:.0%} of the groups an episode outlasted the rollout of "
                f"--num_steps {self.command.ppo.num_steps}, and nothing is learned of such a group: give as many steps "
                "as an episode can have"
            )
        line = (
            f"iteration {logs['iteration']:4d}/{self.iterations}  steps {logs['env_steps']:8,d}  success {success}  "
            f"return {returned}  of {logs['episodes']:4d} episodes  entropy {logs['entropy']:5.2f}  "
            f"kl {logs['approx_kl']:6.4f}  {rate:6,.0f} steps/s  {_clock(left)} left"
        )
        if done == 1:
            self.console.print(f"first update {now - self.started:.1f} s after the start")
            if "broadcast_bytes" in logs:
                self.console.print(f"broadcast    {logs['broadcast_bytes']:,} bytes an update: all that learns")
        if self.live:
            self.live.update(line)
        elif now - self._last_line >= self.SECONDS_BETWEEN_LINES or logs["iteration"] == self.iterations:
            self._last_line = now
            self.console.print(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the live line; the last one stays."""
        self.stop()
        if self._train_start and round(state.epoch or 0) >= self.iterations:
            self.console.print(f"trained in {_clock(time.perf_counter() - self._train_start)}; evaluating")

    def stop(self) -> None:
        """Ends the live line; may be called twice."""
        if self.live:
            self.live.stop()
            self.live = None

    def print_evaluation(self, summary: dict[str, dict[str, Any]]) -> None:
        """Prints the evaluation, and where everything lies."""
        print_table(self.console, summary, f"{self.command.environment.env}, held-out seeds")
        written = sorted(path.name for path in self.run_dir.iterdir() if not path.name.startswith("."))
        self.console.print(f"written to {self.run_dir}: {', '.join(written)}")
        self.console.print(f"{_clock(time.perf_counter() - self.started)} in all")


class RowsDone:
    """Says of an evaluation what it is about to play, and of each row how it went and how long the others will take.

    Args:
        console: where to.
        episodes: of a row.
        steps: of all rows together, at most.
    """

    def __init__(self, console: Console, episodes: int, steps: int) -> None:
        self.console, self.left, self.started = console, len(CONDITIONS), time.perf_counter()
        self.done = self.steps = 0
        rows = f"{episodes} held-out episodes for each of {self.left} rows"
        console.print(f"evaluating   {rows}, {steps:,} steps at most or a little more")

    def __call__(self, row: str, result: Evaluation) -> None:
        """Hears of one row."""
        played = result.episodes
        if not self.done and result.asked is not None:
            self.console.print(
                f"             these episodes are long: {len(played)} of {result.asked} are played, to their end; "
                "--eval_steps allows more"
            )
        self.done, self.left = self.done + 1, self.left - 1
        self.steps += sum(episode.length for episode in played)
        took = time.perf_counter() - self.started
        outcome = outcome_in_words([each.success for each in played], [each.episode_return for each in played])
        left = f", about {_clock(took / self.done * self.left)} left" if self.left else ""
        self.console.print(f"{row.replace('_', ' ')}: {outcome}; {self.steps:,} steps so far, {_clock(took)}{left}")


def print_sensitivity(console: Console, state: Sensitivity) -> None:
    """Prints how far frame and instruction move the state that a policy acts on, with a warning where they do not."""
    console.print(f"state        {state.text}")
    for warning in state.warnings:
        console.print(f"warning: {warning}")


def print_parts(console: Console, policy: VLMPolicy) -> None:
    """Prints a line for each part of the policy: what it has, and what of it learns."""
    for part, total, learning in parameter_table(policy.parts, policy.value_head):
        state = "learns" if learning else "frozen"
        console.print(f"  {part:<15}{total:>13,} parameters, {learning:>11,} learn  {state}")


def print_retention(console: Console, before: Retention, after: Retention) -> None:
    """Prints what the language model still knows after a training, beside what it knew before."""
    if before.perplexity is None or after.perplexity is None:
        console.print(f"text perplexity and questions not measured: {before.why_not or after.why_not}")
        return
    console.print(
        f"text perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}, questions {before.probes:.0%} -> "
        f"{after.probes:.0%}"
    )


def print_table(console: Console, summary: Mapping[Any, dict[str, Any]], title: str) -> None:
    """Prints one row a condition, with 95 % intervals."""
    first = next(iter(summary.values()))
    episodes = episodes_in_words(first["episodes"], first["starts"])
    table = Table(title=f"{title}, {episodes} a row", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    judged = measure_of(summary) == "success"
    for column in ("", *(["success [95 %]"] if judged else []), "return [95 %]", "steps"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in summary.items():
        return_low, return_high = row["return_ci95"]
        table.add_row(
            name.replace("_", " "),
            *([f"{row['success']:.1%} [{row['success_ci95'][0]:.1%}, {row['success_ci95'][1]:.1%}]"] if judged else []),
            f"{row['return_mean']:.2f} [{return_low:.2f}, {return_high:.2f}]",
            f"{row['length_mean']:.1f}",
        )
    console.print(table)
    if not first.get("fixed_by_seed", True):
        console.print(f"{NOT_FIXED}: no two rows are of the same ones, and none is held out")
    if "best" in summary:
        console.print(best_in_words(summary["best"]))
    for warning in warnings_of(summary):
        console.print(warning)
    for name, row in summary.items():
        if "outcomes" in row:
            console.print(f"answers of {name.replace('_', ' ')}: {outcomes_in_words(row['outcomes'])}")


def best_in_words(row: Mapping[str, Any]) -> str:
    """Returns where in its training a run's best policy stood, and how it differs from the final one."""
    where = ", ".join(f"{name.replace('_', ' ')} {row[name]:,}" for name in PLACES if name in row)
    if row["same_weights_as_policy"]:
        return f"best: {where}, which is the final policy"
    found = row["against_policy"]
    difference = difference_in_words(found)
    p = (
        f"p {found['p']:.2g} by {found['test']}"
        if found["p"] is not None
        else "no test, since the episodes are no pairs"
    )
    return (
        f"best: {where}, chosen on validation episodes; {found['measure']} {difference} from the final policy's on the "
        f"same episodes, {p}"
    )


def difference_in_words(found: Mapping[str, Any]) -> str:
    """Returns how a policy's success or mean return differs from another's."""
    return f"{found['difference']:+.1%}" if found["measure"] == "success" else f"{found['difference']:+.2f}"


def outcomes_in_words(outcomes: Mapping[str, int]) -> str:
    """Returns how many answers there were, and the share of each outcome."""
    total = sum(outcomes.values())
    return f"{total:,}, " + ", ".join(f"{name} {count / total:.1%}" for name, count in outcomes.items())


def episodes_in_words(episodes: int, starts: int) -> str:
    """Returns how many, and from how many different first observations where those are fewer."""
    if starts >= episodes:
        return f"{episodes} episodes"
    return f"{episodes} episodes from {'the same start' if starts == 1 else f'{starts} starts'}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
