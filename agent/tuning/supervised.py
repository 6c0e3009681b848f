"""Supervised fine-tuning data: demonstrations and captions in the form that TRL's SFTTrainer takes.

Every row is {"prompt": messages, "completion": messages, "images": [frame]}; the loss is on the completion alone. A
demonstration's prompt is the very one that the policy acts on, and the first token of its answer the one that it is
judged by: `check_tokens` holds what is learned against what the policy acts on.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

from manako.agent.data.pasts import NO_ROW, black_png, past_rows, past_turns
from manako.agent.data.trajectories import MASKS, steps_with_actions
from manako.agent.errors import TrainingError
from manako.policies.interface import Policy, Rows

CHOSEN = "chosen"  # column: False where another action stood in for an answer without one, so nothing is learned of it
CAPTION_PROMPT = "Describe the image."
TEXT_OR_IMAGE = {"type": Value("string"), "text": Value("string")}
MESSAGES = List({"role": Value("string"), "content": List(TEXT_OR_IMAGE)})
FEATURES = Features({"prompt": MESSAGES, "completion": MESSAGES, "images": List(Image())})


def assistant_message(text: str) -> list[dict[str, Any]]:
    """Returns an answer as messages."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def every_action(policy: Policy) -> Rows:
    """Returns the A actions of a closed set, in the env's order."""
    return policy.actions_from_env(np.arange(len(policy.spec.action_names)))


def demonstrations(trajectories: Dataset, policy: Policy, only_success: bool = False) -> Dataset:
    """Returns each step of the trajectories whose action was chosen as prompt and answer.

    Args:
        trajectories: of `agent.data.trajectories`.
        policy: whose prompts and answers these become.
        only_success: leave out episodes without success.

    Raises:
        TrainingError: nothing is left.
    """
    rows = _successful(trajectories, only_success)
    chosen = _where_chosen(rows).tolist()
    actions, thoughts = rows["action"], stored_thoughts(rows, "thought")
    said = answers_of(policy, [actions[row] for row in chosen], [thoughts[row] for row in chosen])
    return Dataset.from_dict(
        {**prompt_columns(rows, policy, chosen), "completion": [assistant_message(text) for text in said]},
        features=FEATURES,
    )


def stored_thoughts(trajectories: Dataset, column: str) -> list[str]:
    """Returns what was thought before each action, "" where nothing is known of it.

    Args:
        trajectories: of `agent.data.trajectories`.
        column: `thought`, of the player, or `expert_thought`.
    """
    if column not in trajectories.column_names:
        return [""] * len(trajectories)
    return [thought or "" for thought in trajectories[column]]


def answers_of(policy: Policy, actions: Sequence[Any], thoughts: Sequence[str]) -> list[str]:
    """Returns what the policy says for actions, each behind its thought where it writes some."""
    keys = [
        (tuple(action) if isinstance(action, list) else action, thought)
        for action, thought in zip(actions, thoughts, strict=True)
    ]
    different = list(dict.fromkeys(keys))
    of_actions = policy.actions_from_env(
        np.array([action for action, _ in different]), [thought for _, thought in different]
    )
    said = dict(zip(different, policy.answers(of_actions), strict=True))
    return [said[key] for key in keys]


def demonstrated_actions(
    trajectories: Dataset,
    only_success: bool = False,
    next_frames: bool = False,
    frames: int = 1,
    history: int = 0,
    thoughts: bool = False,
) -> Dataset:
    """Returns each step of the trajectories as `image` (PNG bytes), `instruction` and `action`, for behaviour cloning.

    Where the data say which actions were allowed, `action_mask` as well.

    Args:
        trajectories: of `agent.data.trajectories`.
        only_success: leave out episodes without success.
        next_frames: and `next_image` (PNG bytes), which the step returned; None behind an episode of a dataset that
            does not hold last frames.
        frames: how many the policy is shown: `past_rows`, those of the frames before, -1 where the episode had none.
        history: how many actions and rewards the prompt tells: `past_turns`, (history, 2).
        thoughts: and `thought`, for a policy that writes.

    Raises:
        TrainingError: nothing is left, or a step took an action that was not allowed.
    """
    rows = _successful(trajectories, only_success)
    masks = [name for name in MASKS if name in rows.column_names]
    chosen = set(_where_chosen(rows).tolist())
    actions = rows["action"]
    for row, mask in enumerate(rows[masks[0]] if masks else ()):
        if row in chosen and not mask[actions[row]]:
            raise TrainingError(
                f"Row {row} of the dataset took {rows[row]['action_name']!r}, which its action_mask does not allow: "
                "expected allowed actions, so collect again, or give --action_masks false."
            )
    columns = rows.select_columns(["image", "instruction", "action", *masks]).cast_column("image", Image(decode=False))
    if frames > 1:
        columns = columns.add_column("past_rows", past_rows(rows, frames - 1))
    if history:
        columns = columns.add_column("past_turns", [turns.tolist() for turns in past_turns(rows, history)])
    if thoughts:
        columns = columns.add_column("thought", stored_thoughts(rows, "thought"))
    if next_frames:
        columns = columns.add_column("next_image", _next_frames(rows))
    return columns if len(chosen) == len(rows) else columns.add_column(CHOSEN, steps_with_actions(rows))


def _next_frames(rows: Dataset) -> list[bytes | None]:
    """What each step of whole episodes, in order, returned, as PNG bytes."""
    frames, episodes = [frame["bytes"] for frame in stored_frames(rows)], rows["episode"]
    following = [
        frames[at + 1] if at + 1 < len(frames) and episodes[at + 1] == episodes[at] else None
        for at in range(len(frames))
    ]
    if "last_image" not in rows.column_names:
        return following
    lasts = rows.cast_column("last_image", Image(decode=False))["last_image"]
    return [after if last is None else last["bytes"] for after, last in zip(following, lasts, strict=True)]


def _successful(trajectories: Dataset, only_success: bool) -> Dataset:
    if only_success and None in trajectories["success"]:
        raise TrainingError(
            "--only_success needs to know what a success is, and nobody said it for all episodes of this dataset: "
            "collect it with --success_return, or leave --only_success out."
        )
    rows = trajectories.filter(lambda success: success, input_columns="success") if only_success else trajectories
    if len(rows) == 0:
        raise TrainingError("No episode of the dataset ended with success: expected some, or --only_success false.")
    return rows


def _where_chosen(rows: Dataset) -> np.ndarray:
    """The steps whose action was chosen: what stood in for an answer without one is no demonstration."""
    chosen = np.flatnonzero(steps_with_actions(rows))
    if not len(chosen):
        raise TrainingError("No answer of the dataset names an action: expected a player that answers with actions.")
    return chosen


def prompt_columns(trajectories: Dataset, policy: Policy, rows: Sequence[int] | None = None) -> dict[str, list[Any]]:
    """Returns the columns `prompt` and `images` of these steps, all by default, as the policy is asked."""
    count, history = policy.spec.frames - 1, policy.spec.history
    chosen = range(len(trajectories)) if rows is None else rows
    texts, frames = trajectories["instruction"], stored_frames(trajectories)
    if history:
        turns = past_turns(trajectories, history)
        prompts = [policy.messages(texts[row], turns[row]) for row in chosen]
    else:
        each = {text: policy.messages(text) for text in {texts[row] for row in chosen}}
        prompts = [each[texts[row]] for row in chosen]
    if not count:
        return {"prompt": prompts, "images": [[frames[row]] for row in chosen]}
    before, black = past_rows(trajectories, count), black_png(trajectories)
    images = [[*(black if past == NO_ROW else frames[past] for past in before[row]), frames[row]] for row in chosen]
    return {"prompt": prompts, "images": images}


def stored_frames(trajectories: Dataset) -> list[dict[str, Any]]:
    """Returns the frames as they are stored: PNG bytes, which a dataset takes without encoding them again."""
    return list(trajectories.cast_column("image", Image(decode=False))["image"])


def sample_frames(trajectories: Dataset, count: int) -> list[np.ndarray]:
    """Returns frames (H, W, 3) uint8 of up to `count` steps, evenly spread."""
    rows = np.unique(np.linspace(0, len(trajectories) - 1, count).astype(int))
    return [np.asarray(frame.convert("RGB")) for frame in trajectories.select(rows)["image"]]


def captions(frames: Iterable[np.ndarray], texts: Iterable[str], images: int = 1) -> Dataset:
    """Returns frames (H, W, 3) uint8 and what is on them, for the alignment of encoder and language model.

    Args:
        frames: of the environment.
        texts: what is on each.
        images: how many a prompt has; those before the frame are black, as at an episode's start.
    """
    pictures = [
        [*[Picture.fromarray(np.zeros_like(frame))] * (images - 1), Picture.fromarray(frame)] for frame in frames
    ]
    content = [{"type": "text", "text": CAPTION_PROMPT}, *({"type": "image"} for _ in range(images))]
    answers = [assistant_message(text) for text in texts]
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": content}]] * len(answers), "completion": answers, "images": pictures},
        features=FEATURES,
    )


def check_tokens(batch: dict[str, Any], policy: Policy, row: dict[str, Any], instruction: str) -> None:
    """Raises where a batch of one row does not hold the policy's own prompt, and behind it one of its answers.

    Args:
        batch: of `SFTCollator`.
        policy: the policy.
        row: the row that it was made of.
        instruction: of that row.

    Raises:
        TrainingError: they differ, so training would be on other tokens than acting.
    """
    learned = batch["labels"][0] != -100
    reads = "encoder_" if "encoder_input_ids" in batch else ""
    read = batch[f"{reads}attention_mask"][0].bool() if reads else batch["attention_mask"][0].bool() & ~learned
    prompt, completion = batch[f"{reads}input_ids"][0][read].tolist(), batch["labels"][0][learned].tolist()
    starts = any(completion[: len(answer)] == answer for answer in policy.answer_tokens(every_action(policy)))
    if prompt != policy.prompt_tokens(instruction) or not starts:
        text = policy.processor.tokenizer.decode(prompt[-4:] + completion)
        raise TrainingError(
            f"The answer {row['completion'][0]['content'][0]['text']!r} is learned as {text!r}, which is not what "
            "this policy acts on: expected a chat template that puts the answer right behind the prompt."
        )
