"""Action masks from the command line: recorded, imitated, preferred, evaluated, and switched off.

`Gates` raises at every action that its mask does not allow, so a command that comes to its end has obeyed.
"""

import json
import sys

import pytest
from datasets import load_from_disk

from manako.experiments import check_env, collect, evaluate, play, run_dpo, run_ppo, run_sft
from manako.experiments.common.command_line import run_main

GATES = ["--env", "tests.helpers.small_envs:tests/Gates-v0"]
SMALL = {"eval_episodes": 6, "gif_episodes": 1, "torch_threads": 1}


def run(runner, monkeypatch, capfd, *words, **flags):
    """The exit code, and what was printed to both streams."""
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["runner.py", *words, *given])
    with pytest.raises(SystemExit) as stop:
        run_main(runner.main)
    printed = capfd.readouterr()
    return stop.value.code, printed.out + printed.err


def test_from_a_recording_to_a_preference(tmp_path, monkeypatch, capfd):
    data, sft = tmp_path / "data", tmp_path / "sft"
    code, _ = run(collect, monkeypatch, capfd, *GATES, error_rate=0.5, episodes=12, num_envs=4, output=data)
    assert code == 0
    kept = load_from_disk(str(data))
    assert all(mask[action] for mask, action in zip(kept["action_mask"], kept["action"], strict=True))
    code, printed = run(run_sft, monkeypatch, capfd, *GATES, dataset=data, loss="actions", output_dir=sft, **SMALL)
    assert code == 0, printed
    for pairs in ("expert", "branch"):
        flags = {"policy": sft / "final", "trainable": "lora", "pairs": pairs, "episodes": 6, "num_steps": 8, **SMALL}
        code, printed = run(run_dpo, monkeypatch, capfd, *GATES, output_dir=tmp_path / pairs, **flags)
        assert code == 0, printed
    code, printed = run(evaluate, monkeypatch, capfd, policy=sft / "final", episodes=6, output=tmp_path / "e.json")
    assert code == 0 and set(json.loads((tmp_path / "e.json").read_text())) >= {"policy", "random", "blank_image"}
    code, printed = run(evaluate, monkeypatch, capfd, policy=sft / "final", episodes=6, action_masks="false")
    assert code == 2 and "broke in step() with RuntimeError: there is no " in printed  # nobody was told


def test_the_header_says_it_and_a_broken_mask_ends_the_run_in_a_sentence(tmp_path, monkeypatch, capfd):
    flags = {"num_envs": 4, "num_steps": 4, "minibatch_size": 16, "total_steps": 16, **SMALL}
    code, printed = run(run_ppo, monkeypatch, capfd, *GATES, output_dir=tmp_path / "good", **flags)
    assert code == 0 and "masks        info['action_mask'] is obeyed" in printed
    broken = ["--env_kwargs", '{"broken": true}']
    code, printed = run(run_ppo, monkeypatch, capfd, *GATES, *broken, output_dir=tmp_path / "broken", **flags)
    assert code == 1 and "that allows none of its 4 actions: expected one at least" in printed
    assert "slot 0, episode seed" in printed and "Traceback" not in printed


def test_check_env_says_whether_masks_come(monkeypatch, capfd):
    code, printed = run(check_env, monkeypatch, capfd, GATES[1])
    assert (
        code == 0 and "action masks  info['action_mask'], obeyed: " in printed and "4 actions at the start" in printed
    )
    code, printed = run(check_env, monkeypatch, capfd, "manako/GoTo-v0")
    assert code == 0 and "action masks  none" in printed


def test_a_key_of_what_is_not_allowed_does_nothing(monkeypatch, capfd, tmp_path):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(play, "SCREEN_GIVEN", True)
    pygame.display.init()
    shown, show = [], play.Window.show
    monkeypatch.setattr(play.Window, "show", lambda self, seen, what: (shown.append(what), show(self, seen, what)))
    for key in (pygame.K_4, *[pygame.K_RIGHT] * 4, pygame.K_ESCAPE):
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
    code, _ = run(play, monkeypatch, capfd, *GATES, output=tmp_path / "play.jsonl")
    pygame.display.quit()
    assert code == 0
    assert shown[1].startswith("jump is not allowed now\nreturn 0 after 0 steps") and shown[2].startswith("return")
