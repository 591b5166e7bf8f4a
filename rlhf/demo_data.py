"""Instruction pairs that a program can check, in English and Chinese, and a tokenizer trained on them.

Everything follows from the seed. A problem (the task and its operands, in either language) is on one side of the
split only, so a held-out answer cannot have been seen in the other language.
"""

import hashlib
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TASKS = ("copy", "reverse", "sort", "arithmetic", "classify")
LANGUAGES = ("en", "zh")
HELD_OUT_EVERY = 10  # one problem in so many is held out

CATEGORIES = {
    "animal": "cat dog horse tiger rabbit sheep",
    "fruit": "apple pear peach grape banana lemon",
    "colour": "red blue green yellow black white",
    "vehicle": "car bus train plane ship truck",
    "动物": "猫 狗 马 老虎 兔子 羊",
    "水果": "苹果 梨 桃子 葡萄 香蕉 柠檬",
    "颜色": "红色 蓝色 绿色 黄色 黑色 白色",
    "交通工具": "汽车 公交 火车 飞机 轮船 卡车",
}
CATEGORIES = {name: words.split() for name, words in CATEGORIES.items()}

INSTRUCTIONS = {
    ("copy", "en"): ("Repeat these words:", "Copy this list:"),
    ("copy", "zh"): ("重复这些词：", "照抄这个列表："),
    ("reverse", "en"): ("Reverse the order of these words:", "Write this list backwards:"),
    ("reverse", "zh"): ("把这些词倒过来：", "倒序写出这个列表："),
    ("sort", "en"): ("Sort these numbers from small to large:", "Put these numbers in ascending order:"),
    ("sort", "zh"): ("把这些数从小到大排列：", "按升序排列这些数字："),
    ("arithmetic", "en"): ("Calculate:", "What is the result of this:"),
    ("arithmetic", "zh"): ("计算：", "这个算式的结果是："),
    ("classify", "en"): ("What kind of thing are these:", "Name the category of these words:"),
    ("classify", "zh"): ("这些是什么：", "说出这些词的类别："),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def solve(task, operands):
    """The one right answer; also what a checker calls."""
    if task == "copy":
        return " ".join(operands)
    if task == "reverse":
        return " ".join(reversed(operands))
    if task == "sort":
        return " ".join(sorted(operands, key=int))
    if task == "arithmetic":
        left, sign, right = operands
        return str(int(left) + int(right) if sign == "+" else int(left) - int(right))
    return next(name for name, words in CATEGORIES.items() if operands[0] in words)


def _operands(task, language, rng):
    names = [name for name in CATEGORIES if name.isascii() == (language == "en")]
    if task in ("copy", "reverse"):
        return rng.sample([word for name in names for word in CATEGORIES[name]], rng.randint(2, 4))
    if task == "sort":
        return [str(number) for number in rng.sample(range(30), rng.randint(2, 4))]
    if task == "arithmetic":
        left, right = rng.randint(0, 9), rng.randint(0, 9)
        if rng.random() < 0.5:
            return [str(left), "+", str(right)]
        return [str(max(left, right)), "-", str(min(left, right))]
    return rng.sample(CATEGORIES[rng.choice(names)], 3)


def _is_held_out(task, operands):
    digest = hashlib.sha256(" ".join([task, *operands]).encode()).digest()
    return digest[0] % HELD_OUT_EVERY == 0


def make_rows(rows, held_out, seed=0):
    """Return (training rows, held-out rows): Alpaca rows with `task` and `language` beside them."""
    rng = random.Random(seed)
    train, test = [], []
    while len(train) < rows or len(test) < held_out:
        task, language = rng.choice(TASKS), rng.choice(LANGUAGES)
        operands = _operands(task, language, rng)
        row = {
            "instruction": " ".join([rng.choice(INSTRUCTIONS[task, language]), *operands]),
            "output": solve(task, operands),
            "task": task,
            "language": language,
        }
        side, wanted = (test, held_out) if _is_held_out(task, operands) else (train, rows)
        if len(side) < wanted:
            side.append(row)
    return train, test


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE: every string has tokens, whatever the language."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
