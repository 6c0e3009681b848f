"""What TRL's trainers are given of every kind of model: the library's own loss of the same chats is the reference."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import SFTConfig

from manako.agent.tuning.collators import DPOCollator, KTOCollator, SFTCollator
from manako.agent.tuning.trainers import PolicySFTTrainer
from manako.policies import PolicySource, load_policy
from manako.policies.library_models import load_config, load_processor
from tests.helpers.families import FAMILIES
from tests.helpers.foreign_models import frames
from tests.test_families import INSTRUCTIONS, datasets, settings

NAMES = ("turn left", "turn right", "go", "stop there")
SHAPE = (64, 64, 3)
# with a chat template that writes an answer right behind the prompt; without one; by the processor's `suffix`; by T5
CHAT = ("llava", "qwen2_5_vl", "gemma3", "internvl", "mllama", "idefics3")
PLAIN = ("kosmos2", "git", "blip2")


def load(family, folder):
    return load_policy(PolicySource(policy=str(FAMILIES[family](folder)), action_format="trie"), NAMES, SHAPE)


def library_loss(family, folder, policy, image, instruction, answer):
    """Sum of -log p over an answer's tokens, and their number, by the library's own loss."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, picture = load_processor(folder, load_config(folder)), Image.fromarray(image)
    text, prompt = policy.prompt(instruction), len(policy.prompt_tokens(instruction))
    if family == "paligemma":
        given = processor(text=text, images=picture, suffix=answer, return_tensors="pt")
    elif family == "blip2_t5":
        given = processor(text=text, images=picture, return_tensors="pt")
        given["labels"] = processor.tokenizer(text_target=answer, return_tensors="pt")["input_ids"]
    elif family in CHAT:
        chat = [*policy.messages(instruction), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        for message in chat:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = picture
        given = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    else:
        own = {"add_special_tokens": False} if family == "git" else {}
        end = processor.tokenizer.sep_token if family == "git" else processor.tokenizer.eos_token
        given = processor(text=[f"{text} {answer}{end}"], images=[picture], return_tensors="pt", **own)
    if "labels" not in given:
        labels = given["input_ids"].clone()
        labels[:, :prompt] = -100
        given["labels"] = labels
    count = int((given["labels"] != -100).sum())
    with torch.no_grad():
        return float(model(**given).loss) * count, count


@pytest.mark.parametrize("family", [*CHAT, *PLAIN, "paligemma", "blip2_t5"])
def test_the_loss_of_sft_is_the_librarys_own(family, tmp_path):
    """Two rows of unequal length in one batch, against one chat after the other."""
    folder = str(tmp_path)
    policy = load(family, tmp_path)
    images = frames(2, SHAPE)
    told = datasets(policy, images)[0]
    expected = [
        library_loss(family, folder, policy, image, instruction, NAMES[action])
        for image, instruction, action in zip(images, INSTRUCTIONS, (0, 3), strict=True)
    ]
    trainer = PolicySFTTrainer(policy, settings(SFTConfig, tmp_path), told, tmp_path)
    trainer.train()
    mean = sum(loss for loss, _ in expected) / sum(count for _, count in expected)
    assert abs(trainer.rows[0]["loss"] - mean) < 2e-4 * mean


@pytest.mark.parametrize("family", ["llava", "mllama", "blip2_t5"])
def test_what_dpo_and_kto_are_given(family, tmp_path):
    """The answers' tokens where the mask says so, chosen before rejected; KTO's unrelated answer is another row's."""
    policy = load(family, tmp_path)
    told, pairs, liked = datasets(policy, frames(2, SHAPE))
    tokens = policy.codec.token_ids

    def said(batch, name=""):
        return [
            tuple(ids[mask == 1].tolist())
            for ids, mask in zip(batch[f"{name}input_ids"], batch[f"{name}completion_mask"], strict=True)
        ]

    def are(found, actions):
        assert len(found) == len(actions)
        for answer, action in zip(found, actions, strict=True):
            assert answer[: len(tokens[action])] == tokens[action]

    are(said(DPOCollator(policy)([pairs[0], pairs[1]])), [0, 3, 1, 2])
    rows = [liked[number] for number in range(4)]
    batch = KTOCollator(policy)(rows)
    are(said(batch), [0, 1, 3, 2])
    are(said(batch, "KL_"), [2, 0, 1, 3])
    assert batch["label"].tolist() == [True, False, True, False]
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 4
    sft = SFTCollator(policy)([told[0]])
    learned = sft["labels"][0] != -100
    are([tuple(sft["labels"][0][learned].tolist())], [0])
    assert np.array_equal(sft["input_ids"][0][learned], sft["labels"][0][learned])
