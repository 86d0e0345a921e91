"""A server of the usual kind, as tutorials write it: transformers' `generate` behind FastAPI, one request at a time.

    python benchmarks/_plain_server.py --model FOLDER --dtype float32

Prints {"url": …} once it listens, at a free port of loopback. POST /v1/completions takes prompt and max_tokens, and
answers with the greedy continuation in OpenAI's form, so that one load generator serves for both servers.
"""

import argparse
import json
import socket
import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


class Asked(BaseModel):
    """What is read of a request."""

    prompt: str
    max_tokens: int


def make_app(folder: str, dtype: str) -> FastAPI:
    """The model, a lock and one route."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    lock = threading.Lock()
    app = FastAPI()

    @app.post("/v1/completions")
    def completions(asked: Asked) -> dict[str, Any]:  # not async: FastAPI runs it on a thread of its pool
        ids = tokenizer(asked.prompt, return_tensors="pt")
        with lock, torch.no_grad():
            found = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                max_new_tokens=asked.max_tokens,
                do_sample=False,
                pad_token_id=model.generation_config.eos_token_id,
            )
        new = found[0, ids["input_ids"].shape[1] :]
        usage = {"prompt_tokens": ids["input_ids"].shape[1], "completion_tokens": len(new)}
        return {"choices": [{"text": tokenizer.decode(new, skip_special_tokens=True)}], "usage": usage}

    return app


def main() -> int:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--dtype", default="float32", help="number format (default float32)")
    args = parser.parse_args()
    app = make_app(args.model, args.dtype)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
