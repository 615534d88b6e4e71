"""The other side of `ops/bench hf`: what transformers makes of, and computes with, model folders.

  peer_transformers.py make KEYS.json FOLDER TOKENS.json [--fp8]   write a random model; print its loss
  peer_transformers.py check FOLDER LOGITS.safetensors TOKENS.json load, compare logits; print difference and loss
  peer_transformers.py tokenizer FOLDER TEXT.json                  print the ids of each text, and the texts of the ids

KEYS are deepseek_v3 configuration keys; TOKENS one sequence and the token after it; the loss is the mean
cross-entropy of its next tokens. --fp8 writes linear layers as DeepSeek-V3 was published: F8_E4M3 with one scale per
block of 128 x 128, the rest BF16. Prints one JSON document. Needs torch, transformers and safetensors.
"""
import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "fixtures"))
import make_deepseek_v3_golden as golden  # noqa: E402
import make_hf_folders  # noqa: E402

def loss_of(model, tokens):
    text = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(text[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()


def make(keys_file, folder, tokens_file, *flags):
    keys = json.loads(pathlib.Path(keys_file).read_text(encoding="utf-8"))
    tokens = json.loads(pathlib.Path(tokens_file).read_text(encoding="utf-8"))
    model = golden.make_model(keys, seed=keys["vocab_size"])
    if "--fp8" in flags:
        make_hf_folders.save_fp8(model, keys, pathlib.Path(folder))
    else:
        model.save_pretrained(folder)
    return {"loss": loss_of(model, tokens)}


def check(folder, logits_file, tokens_file):
    config = transformers.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"  # the default asks for sizes that small models do not have
    loaded, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    expected = safetensors.torch.load_file(logits_file)
    with torch.no_grad():
        logits = loaded(expected["tokens"][None].long(), use_cache=False).logits[0]
    tokens = json.loads(pathlib.Path(tokens_file).read_text(encoding="utf-8"))
    return {"logit_difference": (logits - expected["logits"]).abs().max().item(),
            "largest_logit": expected["logits"].abs().max().item(), "loss": loss_of(loaded, tokens),
            "missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"])}


def tokenizer(folder, texts_file):
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    texts = json.loads(pathlib.Path(texts_file).read_text(encoding="utf-8"))
    ids = [loaded.encode(text) for text in texts]
    return {"ids": ids, "texts": [loaded.decode(i) for i in ids], "end": loaded.eos_token_id}


def main():
    verbs = {"make": make, "check": check, "tokenizer": tokenizer}
    if len(sys.argv) < 3 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    transformers.logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    print(json.dumps(verbs[sys.argv[1]](*sys.argv[2:])))


if __name__ == "__main__":
    main()
