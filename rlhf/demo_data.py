"""Problems that a program can check, in English and Chinese, as plain text, instructions and preferences; a tokenizer
and a random model for them.

Everything follows from the seed. A problem (the task and its operands, in either language) is on one side of the
split only, so a held-out answer cannot have been seen in the other language.
"""

import hashlib
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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

# The same facts as sentences: {words} are the operands and {answer} what solves them.
SENTENCES = {
    ("copy", "en"): "The list is {words}. Once more, the list is {answer}.",
    ("copy", "zh"): "列表是 {words}。再说一遍，列表是 {answer}。",
    ("reverse", "en"): "Forwards it is {words}, and backwards it is {answer}.",
    ("reverse", "zh"): "正着念是 {words}，反着念是 {answer}。",
    ("sort", "en"): "From small to large, {words} become {answer}.",
    ("sort", "zh"): "{words} 从小到大排好是 {answer}。",
    ("arithmetic", "en"): "Everybody knows that {words} = {answer}.",
    ("arithmetic", "zh"): "大家都知道 {words} = {answer}。",
    ("classify", "en"): "All of {words} belong to one category, {answer}.",
    ("classify", "zh"): "{words} 都属于一类，{answer}。",
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
    """Return (training rows, held-out rows): Alpaca rows with `task`, `language` and `operands` beside them."""
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
            "operands": operands,
        }
        side, wanted = (test, held_out) if _is_held_out(task, operands) else (train, rows)
        if len(side) < wanted:
            side.append(row)
    return train, test


def make_texts(rows):
    """The problems of `rows` as plain text: one document of one sentence each."""
    return [
        {"text": SENTENCES[row["task"], row["language"]].format(words=" ".join(row["operands"]), answer=row["output"])}
        for row in rows
    ]


def make_pairs(rows, answers, seed=0):
    """Preference pairs: the right answer before a wrong one to the same instruction. A model's own wrong answer where
    it gave one (`answers`, one a row), else the right answer with a mistake."""
    rng = random.Random(seed)
    return [
        {
            "prompt": row["instruction"],
            "chosen": row["output"],
            "rejected": answer if answer != row["output"] else spoil(row, rng),
        }
        for row, answer in zip(rows, answers, strict=True)
    ]


def spoil(row, rng):
    """The right answer of a row with one mistake: a near number, another category, or a word swapped, replaced or
    left out."""
    words, names = row["output"].split(), list(CATEGORIES)
    if row["task"] == "arithmetic":
        return str(int(row["output"]) + rng.choice([-2, -1, 1, 2, 10]))
    if row["task"] == "classify":
        return rng.choice([name for name in names if name != row["output"]])
    place, mistake = rng.randrange(len(words)), rng.choice(["swap", "replace", "leave out"])
    if mistake == "swap":
        other = (place + 1) % len(words)
        words[place], words[other] = words[other], words[place]
    elif mistake == "replace":
        words[place] = rng.choice([word for word in _vocabulary(row) if word not in words])
    else:
        del words[place]
    return " ".join(words)


def _vocabulary(row):
    if row["task"] == "sort":
        return [str(number) for number in range(30)]
    return [word for name in CATEGORIES for word in CATEGORIES[name] if name.isascii() == (row["language"] == "en")]


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


def write_base_model(folder, texts, vocab_size=704, hidden_size=128, layers=3, rope_theta=500.0):
    """A tokenizer trained on `texts` and a LLaMA of random weights, in Hugging Face layout; 0.7 million parameters by
    default."""
    tokenizer = train_tokenizer(texts, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": rope_theta,
        },  # short rows have no need for slow rotations
        tie_word_embeddings=True,
        initializer_range=0.06,  # the usual 0.02 learns far slower at this width
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
