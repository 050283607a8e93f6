"""Hugging Face's side of run.py: one task, given as JSON; the last line of the output is its result.

`models` and `prepare-*` make what both sides start from: weights, rows of token ids, and the adapter's initial values.
"""

import json
import pathlib
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
GGUF = ROOT / "models" / "smollm2-135m-instruct"
REVIEWS = ROOT / "models" / "movie-reviews"
PROMPT = "Explain what a neural network is."


def dtype(task):
    return torch.bfloat16 if task["precision"] == "bf16" else torch.float32


def models(task):
    """SmolLM2 as a folder in bf16, from its GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if pathlib.Path(task["bf16"], "done").exists():
        return {}
    file = next(GGUF.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(GGUF, gguf_file=file, dtype=torch.float32)
    fields = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(GGUF, gguf_file=file)
    model.to(torch.bfloat16).save_pretrained(task["bf16"])
    tokenizer.save_pretrained(task["bf16"])
    pathlib.Path(task["bf16"], "done").touch()
    return {}


def base(task):
    """The model, quantised where the task says so."""
    from transformers import AutoModelForCausalLM, BertForSequenceClassification, BitsAndBytesConfig

    if task.get("classify"):
        # Without the dropout of pretraining: nothing random, so that losses can be compared.
        return BertForSequenceClassification.from_pretrained(
            task["model"], num_labels=2, dtype=dtype(task), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if task.get("quantize"):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                    bnb_4bit_compute_dtype=dtype(task))
        return AutoModelForCausalLM.from_pretrained(task["model"], quantization_config=config, device_map={"": "cpu"})
    return AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype(task))


def rows(task):
    """The batches' rows in order, as token ids."""
    from transformers import AutoTokenizer

    count = task["rows"] * task["steps"]
    if task["seq"]:
        drawn = torch.randint(0, 49152, (count, task["seq"]), generator=torch.Generator().manual_seed(0)).tolist()
        return [dict(input_ids=ids, labels=ids) for ids in drawn]
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    name = "train-labels.jsonl" if task["classify"] else "train.jsonl"
    with open(REVIEWS / name, encoding="utf-8") as file:
        lines = [json.loads(next(file)) for _ in range(count)]
    if task["classify"]:
        return [dict(input_ids=tokenizer(line["text"], truncation=True, max_length=128).input_ids, label=line["label"]) for line in lines]
    made = []
    for line in lines:
        prompt, answer = (tokenizer(line[key]).input_ids for key in ("prompt", "completion"))
        made.append(dict(input_ids=prompt + answer, labels=[-100] * len(prompt) + answer))
    return made


def prepare_train(task):
    from peft import LoraConfig, get_peft_model

    folder = pathlib.Path(task["inputs"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(task))
    torch.manual_seed(0)
    more = dict(modules_to_save=["classifier"], task_type="SEQ_CLS") if task["classify"] else dict(task_type="CAUSAL_LM")
    model = get_peft_model(base(task | dict(quantize=None)), LoraConfig(r=8, lora_alpha=16, target_modules=task["targets"], **more))
    model.save_pretrained(folder / "adapter")
    return {}


def prepare_merge(task):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.01)
    model.save_pretrained(pathlib.Path(task["inputs"], "adapter"))
    return {}


def prepare_generate(task):
    pathlib.Path(task["inputs"]).mkdir(parents=True, exist_ok=True)
    return {}


def batches(task):
    """Padded batches of the prepared rows."""
    with open(pathlib.Path(task["inputs"], "rows.jsonl"), encoding="utf-8") as file:
        all_rows = [json.loads(line) for line in file]
    for step in range(task["steps"]):
        some = all_rows[step * task["rows"]:(step + 1) * task["rows"]]
        width = max(len(row["input_ids"]) for row in some)
        fill = lambda values, value: values + [value] * (width - len(values))
        batch = dict(input_ids=torch.tensor([fill(row["input_ids"], 0) for row in some]))
        if not task["seq"]:
            batch["attention_mask"] = torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in some])
        if task["classify"]:
            batch["labels"] = torch.tensor([row["label"] for row in some])
        else:
            batch["labels"] = torch.tensor([fill(row["labels"], -100) for row in some])
        yield batch, sum(len(row["input_ids"]) for row in some)


def train(task):
    from peft import PeftModel, prepare_model_for_kbit_training

    model = base(task)
    if task["quantize"]:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # As the command and QLoRA do it: the adapter's own values in f32, whatever the base's.
    model = PeftModel.from_pretrained(model, pathlib.Path(task["inputs"], "adapter"), is_trainable=True)
    if task["checkpointing"]:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=task["learning_rate"], weight_decay=0.01)
    losses, rates = [], []
    for batch, tokens in batches(task):
        begun = time.time()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(tokens / (time.time() - begun))
        losses.append(float(loss))
    return dict(rate=statistics.median(rates[1:] or rates), losses=losses)


def merge(task):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    begun = time.time()
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, pathlib.Path(task["inputs"], "adapter"))
    model.merge_and_unload().save_pretrained(ROOT / "out" / "bench" / "merged-hf")
    return dict(rate=1 / (time.time() - begun))


def generate(task):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    model = base(task).eval()
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    begun = time.time()
    out = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0][inputs["input_ids"].shape[1]:]
    took = time.time() - begun
    tokens = out.tolist()
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return dict(rate=len(tokens) / took, tokens=tokens[:end])


def compare(task):
    """The largest difference between both merged checkpoints."""
    from safetensors import safe_open

    theirs, ours = (safe_open(pathlib.Path(task["work"], name, "model.safetensors"), "pt") for name in ("merged-hf", "merged"))
    worst = 0.0
    for name in theirs.keys():
        worst = max(worst, float((theirs.get_tensor(name).float() - ours.get_tensor(name).float()).abs().max()))
    return dict(worst=worst)


def main():
    task = json.loads(sys.argv[1])
    torch.manual_seed(0)
    kinds = {"models": models, "prepare-train": prepare_train, "prepare-merge": prepare_merge, "prepare-generate": prepare_generate,
             "train": train, "merge": merge, "generate": generate, "compare": compare}
    print(json.dumps(kinds[task["kind"]](task)))


main()
