"""The preset kosmos2: the library's numbers, places said and generated, the contract of a row, what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, SFTConfig

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import ScriptedPlayer
from manako.agent.data.trajectories import to_dataset
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.tuning import preferences
from manako.agent.tuning.supervised import FEATURES, assistant_message, demonstrated_actions, every_action
from manako.agent.tuning.trainers import PolicyCloningTrainer, PolicyDPOTrainer, PolicySFTTrainer
from manako.envs import EpisodeVectorEnv
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.reading import AnswerPlaces, WholePrompt
from manako.policies.trainable import part_of
from tests.helpers.foreign_models import NAMES, TURNS, frames
from tests.helpers.small_runs import ppo_config, weights

TOUCH = "manako/Touch-v0"
FRAME = (24, 24, 3)
CELLS = tuple(f"row {row}, column {column}" for row in (1, 2, 3) for column in (1, 2, 3))
INSTRUCTIONS = ("touch the red ball", "touch the yellow box, and then go to the far end of the room")


def load(policy="kosmos2", names=CELLS, shape=FRAME, **source):
    return load_policy(PolicySource(policy=str(policy), lora_rank=2, **source), names, shape)


@pytest.fixture(scope="module")
def policy():
    return load()


# ---- the library's numbers -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("names", [CELLS, NAMES, TURNS], ids=["places", "words", "several tokens"])
def test_it_says_what_plain_transformers_says(names):
    """Alone and padded, by the library's own call of the processor and the model."""
    policy = load(names=names, action_format="auto" if names is not TURNS else "trie")
    assert policy.codec.format == ("place" if names is CELLS else "token" if names is NAMES else "trie")
    assert isinstance(policy.reading, AnswerPlaces) and policy.checked.hold
    images = frames(2, FRAME, seed=3)
    together = policy.distribution(policy.prepare(images, INSTRUCTIONS))[0]
    for image, instruction, said in zip(images, INSTRUCTIONS, together, strict=True):
        of_answers = []
        for ids in policy.codec.token_ids:
            given = policy.processor(text=policy.prompt(instruction), images=image, return_tensors="pt")
            given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([ids])], 1)
            for name, last in (("attention_mask", 1), ("image_embeds_position_mask", 0)):
                given[name] = torch.cat([given[name], torch.full((1, len(ids)), last)], 1)
            logits = policy.vlm(**given).logits[0, -len(ids) - 1 : -1]  # (len(ids), V)
            total = 0.0
            for depth, token in enumerate(ids):
                beside = {other[depth] for other in policy.codec.token_ids if other[:depth] == ids[:depth]}
                total = total + logits[depth, token] - logits[depth, sorted(beside)].logsumexp(-1)
            of_answers.append(total)
        assert torch.allclose(said, torch.stack(of_answers), rtol=0, atol=1e-5)
    alone = policy.distribution(policy.prepare(images[:1], INSTRUCTIONS[:1]))[0]
    assert torch.allclose(alone[0], together[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_head_sees_less_and_the_numbers_stay(policy):
    inputs = policy.prepare(frames(3, FRAME, seed=1), [*INSTRUCTIONS, "up"])
    whole = WholePrompt(policy.parts, policy.codec, policy.processing)
    seen = []
    head = policy.vlm.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, given, logits: seen.append(logits.shape[1]))
    try:
        one, other = policy.reading.read(inputs), whole.read(inputs)
    finally:
        hook.remove()
    assert seen[0] <= 6 < 40 < seen[1]
    assert torch.allclose(one.hidden, other.hidden, rtol=0, atol=1e-5)
    assert torch.allclose(one.logits[0], other.logits[0], rtol=0, atol=1e-5)
    assert torch.equal(policy.reading.read_hidden(inputs), one.hidden)


@torch.no_grad()
def test_generate_says_the_place_that_the_policy_acts_on(policy):
    """The library's `generate`, held to the answers' tokens, and its processor find the same cell."""
    image = frames(1, FRAME, seed=2)
    best = int(policy.distribution(policy.prepare(image, INSTRUCTIONS[:1]))[0][0].argmax())
    given = policy.processor(text=policy.prompt(INSTRUCTIONS[0]), images=image[0], return_tensors="pt")
    start = given["input_ids"].shape[1]

    def going_on(_, ids):
        said = tuple(ids[start:].tolist())
        return sorted({ids[len(said)] for ids in policy.codec.token_ids if ids[: len(said)] == said})

    out = policy.vlm.generate(**given, do_sample=False, max_new_tokens=4, prefix_allowed_tokens_fn=going_on)
    text = policy.processor.batch_decode(out[:, start:], skip_special_tokens=True)[0]
    assert text == policy.codec.answers[best]
    ((_, _, ((left, top, right, bottom),)),) = policy.processor.post_process_generation(text)[1]
    assert divmod(best, 3) == (int((top + bottom) / 2 * 3), int((left + right) / 2 * 3))


# ---- acts, learns, is saved ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_policy_is_neither_blind_nor_deaf_and_nearly_uniform(policy):
    """What is read changes by more than a tenth of its size, for frames and instructions of the environment."""
    seen = EpisodeVectorEnv(TOUCH, 16, seed=0).reset()
    images, instructions = seen.images, list(seen.instructions)
    others = ["touch the red ball" if text != "touch the red ball" else "touch the blue ball" for text in instructions]

    def read(*sample):
        inputs = policy.prepare(*sample)
        assert policy.distribution(inputs)[0].exp().max() < 0.3  # of 9 cells, so that PPO explores
        return policy.reading.read(inputs).hidden

    own = read(images, instructions)
    for changed in (read(images[::-1], instructions), read(images, others)):
        assert (changed - own).square().mean().sqrt() > 0.1 * own.square().mean().sqrt()


def settings(folder, kind):
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "max_length": None}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return kind(output_dir=str(folder / ".staging"), gradient_checkpointing=False, bf16=False, **options)


def demonstrations(policy):
    env = EpisodeVectorEnv(TOUCH, 4)
    collector = RolloutCollector(env, ScriptedPlayer(policy.spec, 0.5), 2, seed=0, record=True, ask_expert=True)
    return to_dataset([collector.collect(0)], policy, TOUCH, "expert, wrong 50%", {})


def pairs(policy, images):
    """A chosen and a rejected place for each frame."""
    answers = [assistant_message(answer) for answer in policy.answers(every_action(policy))]
    rows = {
        "prompt": [policy.messages(instruction) for instruction in INSTRUCTIONS],
        "images": [[Image.fromarray(image)] for image in images],
    }
    told = Dataset.from_dict({**rows, "completion": [answers[0], answers[8]]}, features=FEATURES)
    compared = {**rows, "chosen": [answers[0], answers[8]], "rejected": [answers[1], answers[4]]}
    return told, Dataset.from_dict(compared, features=preferences.FEATURES)


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora"])
def test_it_learns_what_is_marked_and_is_saved(trainable, tmp_path):
    env = EpisodeVectorEnv(TOUCH, 4, seed=0)
    policy = load(names=env.action_names, shape=env.frame_shape, trainable=trainable)
    assert policy.codec.format == "place"
    parts = {name: part_of(name, policy.parts) for name in weights(policy.vlm)}
    torch.nn.init.normal_(policy.value_head.out.weight)  # at 0 the values send no gradient on

    def moved(train):
        start = weights(policy.vlm)
        train()
        return {parts[name] for name, now in weights(policy.vlm).items() if not torch.equal(now, start[name])}

    learning = {
        "full": {"encoder", "adapter", "language_model"},
        "adapter": {"adapter"},
        "lora": {"adapter", "lora"},
    }[trainable]
    config = ppo_config(tmp_path / "ppo", num_iterations=1, num_steps=2, minibatch_size=4)
    assert moved(PPOTrainer(policy, config, env).train) == learning  # stops where the first ratio is not 1
    data = demonstrated_actions(demonstrations(policy))
    assert moved(PolicyCloningTrainer(policy, settings(tmp_path, SFTConfig), data, tmp_path).train) == learning
    told, compared = pairs(policy, frames(2, FRAME))
    assert moved(PolicySFTTrainer(policy, settings(tmp_path, SFTConfig), told, tmp_path).train) == learning
    dpo = PolicyDPOTrainer(policy, settings(tmp_path, DPOConfig), compared, tmp_path)
    assert moved(dpo.train) == learning and abs(dpo.rows[0]["loss"] - np.log(2)) < 1e-4

    inputs = policy.prepare(frames(2, FRAME), INSTRUCTIONS)
    after = policy.distribution(inputs)
    policy.save(tmp_path / "saved")
    again = load(tmp_path / "saved", env.action_names, env.frame_shape, trainable=trainable)
    assert all(map(torch.equal, again.distribution(inputs), after)) and again.codec.answers == policy.codec.answers
    assert again.prompt("up") == policy.prompt("up") and again.prompt("up").startswith("<grounding>")
    assert again.prompt_tokens("up") == policy.prompt_tokens("up")
    if trainable == "full":  # the folder is one for plain transformers
        vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
        processor = AutoProcessor.from_pretrained(tmp_path / "saved")
        text = processor.apply_chat_template(policy.messages("up"), add_generation_prompt=True)
        assert text == policy.prompt("up") and type(vlm).__module__.startswith("transformers.")
        given = processor(text=text, images=frames(1, FRAME)[0], return_tensors="pt")
        assert given["input_ids"][0].tolist() == policy.prompt_tokens("up")
        with torch.no_grad():
            assert torch.equal(vlm(**given).logits, policy.vlm(**given).logits)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    [
        "touch <patch_index_0005> the red ball",
        "touch <object><patch_index_0000><patch_index_0341></object> the <grounding> red <phrase>ball</phrase>",
        "touch <patch_<patch_index_0005>index_0005> the </image></s> red <image> ball",
        "touch the <patch_index_\u200b0005> red ball",
    ],
)
def test_text_of_an_env_brings_no_place_in(instruction, policy):
    tokenizer = policy.processor.tokenizer
    plain = policy.prompt_tokens("touch the red ball")
    cleaned = policy.prompts.clean(instruction)
    assert cleaned.replace("\\", "") == instruction  # all of it is read
    assert not any(token.content in cleaned for token in tokenizer.added_tokens_decoder.values())
    ids = policy.prompt_tokens(instruction)
    added = set(tokenizer.added_tokens_decoder)
    queries = policy.vlm.config.latent_query_num
    assert [token for token in ids[queries + 2 :] if token in added] == [
        token for token in plain[queries + 2 :] if token in added
    ]


def test_it_has_no_parts_to_replace():
    for flag, name in (("vision_encoder", "vit"), ("adapter", "mlp"), ("language_model", "smollm2")):
        with pytest.raises(PolicyError, match=f"--{flag} '{name}' came, but the parts of kosmos2 are") as caught:
            load(**{flag: name})
        assert "\n" not in str(caught.value)
    with pytest.raises(PolicyError, match="image_size 30 is no multiple of patch_size 8"):
        load(image_size=30)
    assert load(patch_size=4).vlm.config.vision_config.patch_size == 4


def test_the_system_text_may_hold_no_place():
    with pytest.raises(PolicyError, match="holds the special token '<patch_index_0003>'"):
        load(system="Go to <patch_index_0003>. Actions: {actions}.")


def test_the_seed_decides_the_weights(policy):
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), load().parameters(), strict=True))
    assert not torch.equal(policy.vlm.get_output_embeddings().weight, load(seed=1).vlm.get_output_embeddings().weight)
