"""One entry of the inference benchmark: build the model as the entry would, answer the prompts, write down what was
seen.

Run by its path, `python inference_worker.py OPTIONS_JSON RESULT_FILE`. The model's random weights, the prompts and the
greedy choice of tokens are the same for every entry, and none of them ever stops early.
"""

import json
import re
import sys
import tempfile
import time
import types
from pathlib import Path

import psutil
import safetensors.torch
import torch
import transformers


def main(argv):
    options = types.SimpleNamespace(**json.loads(argv[0]))
    device = torch.device(options.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    prompts = make_prompts(options)
    answer, model = BUILDERS[options.builder](options, device, dtype)

    answer(prompts, 4)  # warm-up: kernels are chosen, memory is taken, graphs are recorded
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first_s, _ = timed(lambda: answer(prompts, 1), device)
    busy_s, cpu_s = machine_busy_s(), time.process_time()
    wall_s, tokens = timed(lambda: answer(prompts, options.new_tokens), device)
    busy_s, cpu_s = machine_busy_s() - busy_s, time.process_time() - cpu_s
    metrics = {
        "tokens_per_s": len(prompts) * options.new_tokens / wall_s,
        "decoded_tokens_per_s": len(prompts) * (options.new_tokens - 1) / (wall_s - first_s),
        "first_token_s": first_s,
        "peak_rss_bytes": 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]),
        # What the rest of the machine did meanwhile, of all its cores: it tells a reading taken in noise.
        "other_load_share": max(0.0, busy_s - cpu_s) / (wall_s * psutil.cpu_count()),
        "weights_read_bytes": weights_read_bytes(model),
        "kv_bytes": kv_bytes(model, options),
    }
    if device.type == "cuda":
        metrics["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    metrics["copy_GB_per_s"] = copy_bytes_per_s(device) / 1e9
    Path(argv[1]).write_text(json.dumps({"metrics": metrics, "tokens": tokens}))


def weights_read_bytes(model):
    """Of one step: all but the embedding, of which a step reads a row a prompt, unless it is the head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    unread = 0 if getattr(head, "weight", None) is embedding else embedding.nbytes
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - unread


def kv_bytes(model, options):
    """Of the longest prompt and its answer, for every prompt, in whole blocks of our cache."""
    from megalith.rlhf.kv_cache import BLOCK, bytes_per_token

    columns = -(-(options.prompt_tokens + options.new_tokens) // BLOCK) * BLOCK
    return options.batch_size * columns * bytes_per_token(model)


def copy_bytes_per_s(device):
    """Bytes/s of a plain copy, read and written: the best of five."""
    source = torch.ones(64 << 20 if device.type == "cuda" else 16 << 20, device=device)
    target = torch.empty_like(source)
    return max(2 * source.nbytes / timed(lambda: target.copy_(source), device)[0] for _ in range(5))


def make_prompts(options):
    """Random token ids; the longest has `prompt_tokens`, the shortest half of them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(options.prompt_tokens, options.prompt_tokens // 2, options.batch_size).int().tolist()
    return [torch.randint(options.model["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def make_config(options, dtype):
    return transformers.LlamaConfig(**options.model, dtype=dtype, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def make_model(options, device, dtype):
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(make_config(options, dtype)).to(dtype).eval()
    # Answers that depend on more than the last token, and no near ties.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(2)
    return model.requires_grad_(False)


# Entries: each returns answer(prompts, new_tokens) -> the new tokens of each, and its model.


def build_transformers(options, device, dtype):
    """`generate`, with the prompts padded on the left."""
    model = make_model(options, device, dtype)
    cache = {} if options.cache == "dynamic" else {"cache_implementation": options.cache, "disable_compile": True}

    def answer(prompts, new_tokens):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **cache
        )
        return output[:, longest:].tolist()

    return answer, model


def build_transformers_continuous(options, device, dtype):
    """`generate_batch`: transformers' own continuous batching over a paged cache."""
    model = make_model(options, device, dtype)

    def answer(prompts, new_tokens):
        config = transformers.GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        outputs = model.generate_batch(prompts, generation_config=config, progress_bar=False)
        ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
        return [output.generated_tokens for output in ordered]

    return answer, model


def build_megalith(options, device, dtype):
    model = make_model(options, device, dtype)
    if options.offload:
        import megalith.engine

        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        model, _ = megalith.engine.initialize(
            model,
            None,
            placement="host",
            precision=options.precision,
            device_budget=int(options.offload * weight_bytes),
            device=device,
        )
    return megalith_answer(model)


def build_megalith_4bit(options, device, dtype):
    """Every linear of the blocks over random codes in groups of 128, which cost what trained ones do."""
    from megalith.rlhf import load_quantized

    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), options)
        return megalith_answer(load_quantized(folder, device=device, dtype=dtype))


def write_random_checkpoint(folder, options):
    """A GPTQ checkpoint (v1, symmetric) in Hugging Face layout: float16 where a weight is not quantised."""
    config = make_config(options, torch.float16)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, columns, groups = module.in_features, module.out_features, -(-module.in_features // 128)
            full = torch.iinfo(torch.int32)
            tensors[f"{name}.qweight"] = torch.randint(full.min, full.max, (rows // 8, columns), dtype=torch.int32)
            tensors[f"{name}.qzeros"] = torch.full((groups, columns // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{name}.scales"] = torch.full((groups, columns), 0.04 / 8, dtype=torch.float16)
            tensors[f"{name}.g_idx"] = torch.arange(rows, dtype=torch.int32) // 128
    for name, parameter in model.named_parameters():
        if f"{name.removesuffix('.weight')}.qweight" not in tensors:
            values = torch.ones(parameter.shape) if parameter.dim() == 1 else 0.04 * torch.randn(parameter.shape)
            tensors[name] = values.half()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "gptq"}
    config.update({"quantization_config": quantization})
    config.save_pretrained(folder)


def megalith_answer(model):
    from megalith.rlhf.decoding import generate
    from megalith.rlhf.sampling import SamplingOptions

    def answer(prompts, new_tokens):
        greedy = SamplingOptions(max_new_tokens=new_tokens, temperature=0)
        return [answer.tokens for answer in generate(model, prompts, greedy, batch_size=len(prompts))]

    return answer, model


def build_megalith_batcher(options, device, dtype):
    """All prompts submitted at once to the thread that serves."""
    from megalith.rlhf.batching import Batcher, BatchingOptions
    from megalith.rlhf.sampling import SamplingOptions

    model = make_model(options, device, dtype)
    batcher = Batcher(model, BatchingOptions(prefix_share=0))

    def answer(prompts, new_tokens):
        greedy = SamplingOptions(max_new_tokens=new_tokens, temperature=0)
        return [list(stream) for stream in [batcher.submit(prompt, greedy) for prompt in prompts]]

    return answer, model


BUILDERS = {
    "transformers": build_transformers,
    "transformers-continuous": build_transformers_continuous,
    "megalith": build_megalith,
    "megalith-batcher": build_megalith_batcher,
    "megalith-4bit": build_megalith_4bit,
}


def timed(function, device):
    """Seconds, and what `function` returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s, result


def machine_busy_s():
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait


if __name__ == "__main__":
    main(sys.argv[1:])
