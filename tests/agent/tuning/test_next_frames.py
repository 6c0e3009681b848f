"""What followed a step, in data and in cloning's loss: frames by replay, the loss as a sum, LoRA, what is refused."""

import numpy as np
import pytest
import torch
from trl import SFTConfig

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer
from manako.agent.data.trajectories import to_dataset
from manako.agent.png import picture
from manako.agent.tuning.supervised import demonstrated_actions
from manako.agent.tuning.trainers import PolicyCloningTrainer
from manako.envs import EpisodeVectorEnv
from manako.experiments import run_sft
from manako.experiments.common.command_line import UsageError
from manako.policies.interface import NEXT_CODES
from tests.helpers.small_runs import GOTO, goto_policy


def dreamer(coef=0.5, **source):
    return goto_policy(policy="vision_tokens", next_frame_coef=coef, **{"trainable": "full", **source})


@pytest.fixture(scope="module")
def played():
    policy = goto_policy()
    collector = RolloutCollector(EpisodeVectorEnv(GOTO, 4), RandomPlayer(policy.spec), 24, seed=0, record=True)
    return to_dataset([collector.collect(0)], policy, GOTO, "random", {})


def test_next_frames_are_those_of_the_episode_played_again(played):
    rows = demonstrated_actions(played, next_frames=True)
    env = EpisodeVectorEnv(GOTO, 1)
    ends = 0
    for at, row in enumerate(rows):
        if played[at]["step"] == 0:
            env.reset(seeds=[played[at]["seed"]])
        result = env.step([row["action"]])
        assert (picture(row["next_image"]) == result.observations.images[0]).all(), at
        ends += bool(result.terminated[0] | result.truncated[0])
    assert ends == max(played["episode"]) + 1 > 4


def test_a_dataset_without_last_frames_leaves_them_open(played):
    rows = demonstrated_actions(played.remove_columns("last_image"), next_frames=True)
    ended = [one | other for one, other in zip(played["terminated"], played["truncated"], strict=True)]
    assert [after is None for after in rows["next_image"]] == ended
    assert "next_image" not in demonstrated_actions(played).column_names


def cloning_loss(policy, rows, folder):
    args = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = PolicyCloningTrainer(policy, args, rows, folder)
    batch = trainer.collate([rows[at] for at in range(16)])
    return batch, trainer.compute_loss(policy.model, batch)


def next_of(played):
    rows = demonstrated_actions(played, next_frames=True)
    return np.stack([picture(after) for after in rows["next_image"][:16]])


def test_cloning_adds_the_next_frame(played, tmp_path):
    policy, alone = dreamer(), demonstrated_actions(played)
    batch, loss = cloning_loss(policy, demonstrated_actions(played, next_frames=True), tmp_path)
    _, without = cloning_loss(policy, alone, tmp_path)
    followed = policy.see_next(batch["inputs"].select(batch["observation"]), next_of(played))
    expected = policy.next_frame.loss(followed, alone["action"][:16])
    assert followed[NEXT_CODES].shape == (16, 9) and len(batch["taken"]) == 16 > len(batch["inputs"])
    torch.testing.assert_close(loss, without + 0.5 * expected)
    lacking = demonstrated_actions(played.remove_columns("last_image"), next_frames=True)
    assert (cloning_loss(policy, lacking, tmp_path)[1] - loss).abs() > 1e-6  # what is not known is left out


def test_lora_learns_it_as_well_and_keeps_it(played, tmp_path):
    policy = dreamer(trainable="lora", lora_rank=2)
    batch, loss = cloning_loss(policy, demonstrated_actions(played, next_frames=True), tmp_path)
    loss.backward()
    learned = [name for name, parameter in policy.vlm.named_parameters() if parameter.grad is not None]
    assert any("adapter.modules_to_save.default.head" in name for name in learned)
    assert any("lora_" in name for name in learned) and not any("vision_tower" in name for name in learned)
    given = batch["followed"], batch["taken"]["index"].tolist()
    start = policy.next_frame.loss(*given).detach()
    torch.optim.SGD([p for p in policy.vlm.parameters() if p.requires_grad], lr=0.5).step()
    with torch.no_grad():
        after = policy.next_frame.loss(*given)
        assert after < start - 1e-3
        policy.save(tmp_path / "saved")
        again = goto_policy(policy=str(tmp_path / "saved"), trainable="full", next_frame_coef=0.5)
        torch.testing.assert_close(again.next_frame.loss(*given), after)
        with policy.as_reference():  # LoRA, and what is trained beside it, are off
            torch.testing.assert_close(policy.next_frame.loss(*given), start)


@pytest.mark.parametrize("words", [["--loss", "tokens"], ["--stage", "align"], ["--stage", "represent"]])
def test_other_stages_refuse_the_coefficient(words, tmp_path):
    dataset = [] if "--stage" in words else ["--dataset", str(tmp_path)]
    with pytest.raises(UsageError, match="--next_frame_coef is 0.5, but only --stage instruct --loss actions"):
        run_sft.read_line(["--policy", "vision_tokens", "--next_frame_coef", "0.5", *words, *dataset])
