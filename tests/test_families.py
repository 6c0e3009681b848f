"""One contract for every family of vision-language models: computed as transformers computes it, and it learns.

Each family is a tiny random folder (tests/helpers/families), and so is each architecture of our own (own_rows). The
reference is plain transformers: the library's model on what the library's processor makes of a chat, one sample at a
time.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import DPOConfig, KTOConfig, SFTConfig

from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.tuning import preferences
from manako.agent.tuning.supervised import FEATURES, assistant_message, check_tokens, every_action
from manako.agent.tuning.trainers import PolicyDPOTrainer, PolicyKTOTrainer, PolicySFTTrainer
from manako.envs import EpisodeVectorEnv
from manako.memory import NO_ACTION
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.library_models import load_config, load_processor
from manako.policies.trainable import part_of
from tests.helpers.families import FAMILIES
from tests.helpers.families.more import MORE
from tests.helpers.foreign_models import NAMES, TURNS, frames
from tests.helpers.own_rows import OWN_ROWS, write
from tests.helpers.small_runs import ppo_config, weights

# families of which something is missing, and the sentence that says so
REFUSED = {
    "blip": "does not go on from a prompt",
    "fuyu": "does not take frames of 64 x 64 pixels",
    "kosmos2_5": "names no image token",
    "pix2struct": "names no image token",
    "vision_encoder_decoder": "names no image token",
    "cohere2_vision": "install torchvision (pip install torchvision torch==",
    "lfm2_vl": "install torchvision (pip install torchvision torch==",
    "llama4": "install torchvision (pip install torchvision torch==",
}
NO_ADAPTER = {"chameleon", "emu3", "ovis2"}  # the image goes into the vocabulary, no module stands between
NO_ANSWERS_OF_SEVERAL_TOKENS = {"janus": "is not computed here as transformers computes it"}  # its generate differs
NO_SHARED_PREFIX = {"qwen3_5"}  # layers with a state instead of keys
# that read one image a prompt
ONE_IMAGE = {"flamingo", "preset_kosmos2", "uniter", "vilbert", "paligemma", "blip2", "blip2_t5", "instructblip"}
ONE_IMAGE |= {"instructblip_t5", "kosmos2", "idefics", "git", "florence2"}
ONE_IMAGE_SAYS = "reads one image a prompt: expected --frames 1, or a model that reads several, such as the preset tiny"
ONE_PLACE = "does not hold a system text, an instruction and 3 images .it gives 1 places for an image"  # PaliGemma's
USUAL = ("llava", "qwen2_vl", "gemma3", "idefics3", "internvl")  # what is held for all of them when tests may be slow
ACTING = [*OWN_ROWS, *(family for family in FAMILIES if family not in REFUSED)]
ONE_SIZE = {*MORE, *OWN_ROWS}  # of frames; a preset's encoder is made for one
CONTRACT = [pytest.param(family, marks=[pytest.mark.slow] if family in MORE else []) for family in ACTING]
SHAPES = [(24, 24, 3), (64, 64, 3), (160, 64, 3)]
INSTRUCTIONS = ("go to the far end of the red room and turn left there", "up")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a family, written when it is first asked for."""

    class Folders(dict):
        def __missing__(self, family):
            folder = tmp_path_factory.mktemp(family)
            self[family] = str(write(family, folder) if family in OWN_ROWS else FAMILIES[family](folder))
            return self[family]

    return Folders()


def load(folder, names=NAMES, shape=(64, 64, 3), trainable="full", **source):
    return load_policy(PolicySource(policy=folder, trainable=trainable, lora_rank=2, **source), names, shape)


# ---- computed as it is -------------------------------------------------------------------------------------------


def of_the_library(folder, policy, image, instruction, turns=None):
    """What the library's processor makes of this chat: by its own chat template, or of plain text where it has none.

    Of several images, (k, H, W, 3), in their order.
    """
    processor = load_processor(folder, load_config(folder))
    pictures = [Image.fromarray(frame) for frame in (image if image.ndim == 4 else image[None])]
    messages = policy.messages(instruction, turns)
    if processor.chat_template:
        parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        for part, picture in zip(parts, pictures, strict=True):
            part["image"] = picture
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    text = policy.prompt(instruction, turns)
    own = {"add_special_tokens": False} if text.startswith("[CLS]") else {}  # GIT
    return processor(text=[text], images=pictures, return_tensors="pt", **own)


@torch.no_grad()
@pytest.mark.parametrize("family", ACTING)
def test_a_policy_computes_what_plain_transformers_computes(family, folders):
    """Alone and in a padded batch, at three sizes of frames; whatever was called before."""
    folder = folders[family]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    for shape in SHAPES if family not in ONE_SIZE else SHAPES[1:2]:
        policy = load(folder, shape=shape)
        images = frames(2, shape, seed=3)
        expected, start = [], policy.parts.answer_start
        rows = torch.tensor(policy.codec.token_ids)[:, 0]  # (A,), answers of one token
        for image, instruction in zip(images, INSTRUCTIONS, strict=True):
            given = of_the_library(folder, policy, image, instruction)
            decoder = {"decoder_input_ids": torch.tensor([start])} if start else {}
            expected.append(model(**given, **decoder).logits[0, -1, rows].log_softmax(-1))
            assert tuple(given["input_ids"][0].tolist()) == tuple(policy.prompt_tokens(instruction))
        inputs = policy.prepare(images, INSTRUCTIONS)
        together = policy.distribution(inputs)[0]  # (B, A)
        alone = [policy.distribution(policy.prepare(images[i : i + 1], INSTRUCTIONS[i : i + 1]))[0][0] for i in (0, 1)]
        for row, logprobs in enumerate(expected):
            largest = logprobs.abs().max()
            assert (alone[row] - logprobs).abs().max() <= 1e-5 * largest, (shape, "alone")
            assert (together[row] - logprobs).abs().max() <= 1e-5 * largest, (shape, "padded")
        assert torch.equal(policy.distribution(inputs)[0], together)  # nothing is kept from call to call
        others = policy.distribution(policy.prepare(images[::-1], INSTRUCTIONS))[0]
        assert (others - together).abs().max() > 1e-3  # the image counts


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    [family if family in (*OWN_ROWS, *USUAL) else pytest.param(family, marks=pytest.mark.slow) for family in ACTING],
)
def test_several_frames_and_what_was_done_are_read_as_plain_transformers_reads_them(family, folders):
    """Three images and two turns a prompt; a family that reads one image a prompt says so in a sentence."""
    folder, count = folders[family], 3
    if family in ONE_IMAGE:
        with pytest.raises(PolicyError, match=f"--frames 3 came, but \\w+ {ONE_IMAGE_SAYS}|{ONE_PLACE}"):
            load(folder, frames=count)
        return
    policy = load(folder, frames=count, history=2)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    images = np.stack([frames(count, (64, 64, 3), seed=seed) for seed in (3, 4)])  # (2, k, H, W, 3)
    turns = np.array([[[NO_ACTION, 0.0], [1, -0.25]], [[0, 1.0], [2, 0.0]]])  # (2, turns, 2)
    rows = torch.tensor(policy.codec.token_ids)[:, 0]
    expected = []
    for each, instruction, done in zip(images, INSTRUCTIONS, turns, strict=True):
        given = of_the_library(folder, policy, each, instruction, done)
        expected.append(model(**given).logits[0, -1, rows].log_softmax(-1))
        assert given["input_ids"][0].tolist() == policy.prompt_tokens(instruction, done)
        said = ", ".join([f"{NAMES[1]} (reward -0.25)"] if done[0, 0] < 0 else [f"{NAMES[0]} (reward 1)", NAMES[2]])
        assert f"{instruction}\nDone: {said}." in policy.prompt(instruction, done)

    def ask(images, turns):
        told = {"past_frames": images[:, :-1], "past_turns": turns}
        return policy.distribution(policy.prepare(images[:, -1], INSTRUCTIONS, told))[0]

    logprobs = ask(images, turns)
    for row, right in enumerate(expected):
        assert (logprobs[row] - right).abs().max() <= 1e-5 * right.abs().max(), row
    for number in range(count):  # each image counts, and so does what was done
        others = images.copy()
        others[:, number] = 255 - others[:, number]
        assert (ask(others, turns) - logprobs).abs().max() > 1e-3, number
    assert (ask(images, turns[::-1]) - logprobs).abs().max() > 1e-3
    assert (ask(images[:, [1, 0, 2]], turns) - logprobs).abs().max() > 1e-3  # and so does their order


def with_an_answer(folder, policy, answer):
    """Token ids behind the prompt where the library itself puts an answer; None where that is not behind the prompt."""
    processor = load_processor(folder, load_config(folder))
    picture = Image.fromarray(frames(1, (64, 64, 3))[0])
    prompt = policy.prompt_tokens("go")
    if policy.parts.answer_start:
        return processor.tokenizer(text_target=answer, add_special_tokens=False)["input_ids"]
    if type(processor).__name__ == "PaliGemmaProcessor":
        whole = processor(text=policy.prompt("go"), images=picture, suffix=answer)["input_ids"][0]
    elif processor.chat_template:
        chat = [*policy.messages("go"), assistant_message(answer)[0]]
        for message in chat:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = picture
        made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        whole = made["input_ids"][0]
    else:
        own = {"add_special_tokens": False} if policy.prompt("go").startswith("[CLS]") else {}
        whole = processor(text=[f"{policy.prompt('go')} {answer}"], images=[picture], **own)["input_ids"][0]
    whole = [int(token) for token in whole]
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else None


@pytest.mark.parametrize("family", [family for family in ACTING if family not in NO_ANSWERS_OF_SEVERAL_TOKENS])
def test_an_answers_tokens_are_those_by_which_the_tokenizer_goes_on(family, folders):
    policy = load(folders[family], ("turn left", "turn right"), action_format="trie")
    elsewhere = 0
    for answer, tokens in zip(("turn left", "turn right"), policy.codec.token_ids, strict=True):
        following = with_an_answer(folders[family], policy, answer)
        elsewhere += following is None
        assert following is None or tuple(following[: len(tokens)]) == tokens
        assert "".join(policy.processor.tokenizer.decode(list(tokens)).split()) == answer.replace(" ", "")
    # templates that write a past answer otherwise than they ask for one, and a separator that ends each text
    assert elsewhere == (2 if family in ("llava_onevision", "pixtral", "qwen3_5", "chameleon") else 0)


def test_an_answer_alone_is_another_one_with_a_tokenizer_of_the_llama_2_kind(folders):
    policy = load(folders["llava"], ("turn left", "turn right"), action_format="trie")
    tokenizer = policy.processor.tokenizer
    alone = tokenizer.tokenize(policy.prompts.lead + "turn left")
    assert alone == ["▁", "▁turn", "▁left"]
    assert tokenizer.convert_ids_to_tokens(policy.codec.token_ids[0]) == ["▁turn", "▁left"]


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_act_here_says_why(family, folders):
    with pytest.raises(PolicyError) as caught:
        load(folders[family])
    assert REFUSED[family] in str(caught.value) and "\n" not in str(caught.value)


# ---- acts, learns, is saved --------------------------------------------------------------------------------------


def settings(kind, folder):
    return kind(
        output_dir=str(folder / ".staging"),
        per_device_train_batch_size=2,
        max_steps=1,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
    )


def datasets(policy, images):
    """One row a frame for each trainer: prompt and answer; chosen and rejected; each of these with a label."""
    prompts = [policy.messages(instruction) for instruction in INSTRUCTIONS]
    answers = [assistant_message(answer) for answer in policy.answers(every_action(policy))]
    shared = {"prompt": prompts, "images": [[Image.fromarray(image)] for image in images]}
    told = Dataset.from_dict({**shared, "completion": [answers[0], answers[3]]}, features=FEATURES)
    pairs = Dataset.from_dict(
        {**shared, "chosen": [answers[0], answers[3]], "rejected": [answers[1], answers[2]]},
        features=preferences.FEATURES,
    )
    return told, pairs, preferences.unpaired(pairs)


@pytest.mark.parametrize("family", CONTRACT)
def test_a_policy_acts_learns_and_is_saved(family, folders, tmp_path):
    names = NAMES if family in NO_ANSWERS_OF_SEVERAL_TOKENS else TURNS
    answers = "token" if names is NAMES else "trie"
    trainable = "lora+value_head" if family in NO_ADAPTER else "lora"
    env = EpisodeVectorEnv("manako/GoTo-v0", 4, seed=0)
    policy = load(folders[family], names, env.frame_shape, trainable, action_format=answers)
    assert family in NO_SHARED_PREFIX or isinstance(policy.reading, policy.parts.reading), policy.why_whole
    images = frames(2, env.frame_shape)
    inputs = policy.prepare(images, INSTRUCTIONS)
    before = policy.distribution(inputs)[0].detach()
    parts = {name: part_of(name, policy.parts) for name, _ in policy.vlm.named_parameters()}

    # PPO, which stops by itself where the first ratio is not 1
    torch.nn.init.normal_(policy.value_head.out.weight)  # at 0 the values send no gradient on
    start = weights(policy.vlm)
    PPOTrainer(policy, ppo_config(tmp_path / "ppo", num_iterations=1, num_steps=2, minibatch_size=4), env).train()
    moved = {parts[name] for name, now in weights(policy.vlm).items() if not torch.equal(now, start[name])}
    assert moved == ({"lora"} if family in NO_ADAPTER else {"lora", "adapter"})

    told, pairs, liked = datasets(policy, images)
    trainer = PolicySFTTrainer(policy, settings(SFTConfig, tmp_path), told, tmp_path)
    check_tokens(trainer.data_collator([told[0]]), policy, told[0], INSTRUCTIONS[0])
    trainer.train()
    assert 0 < trainer.rows[0]["loss"] < 30 and trainer.rows[0]["grad_norm"] > 0
    for kind, config, data, first in (
        (PolicyDPOTrainer, DPOConfig, pairs, np.log(2)),  # -log sigmoid(0): policy and reference are the same
        (PolicyKTOTrainer, KTOConfig, liked, 0.5),
    ):
        trainer = kind(policy, settings(config, tmp_path), data, tmp_path)
        trainer.train()
        assert abs(trainer.rows[0]["loss"] - first) < 1e-4 and trainer.rows[0]["grad_norm"] > 0

    after = policy.distribution(inputs)[0].detach()
    assert (after - before).abs().max() > 1e-4  # it has learned
    policy.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), names, env.frame_shape, trainable, action_format=answers)
    assert torch.equal(again.distribution(inputs)[0], after)

    decoder = {"decoder_input_ids": torch.tensor([policy.parts.answer_start] * 2)} if policy.parts.answer_start else {}
    said = policy.vlm.generate(**policy.processing.model_inputs(inputs), **decoder, max_new_tokens=2, do_sample=False)
    assert said.shape[0] == 2 and said.shape[1] >= 1
