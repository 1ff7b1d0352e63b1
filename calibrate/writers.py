"""What writes stories: an OpenAI-compatible server, or a model in this process."""

from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from calibrate.generation import Request, Settings, Writer
from calibrate.models import Checkpoint

RETRIES = 5  # of one HTTP request, with growing waits


def host(url: str) -> str:
    """The host of a server's URL, for the data card: without port, path, user and password.

    Raises:
        ValueError: there is none.
    """
    name = urlsplit(url).hostname
    if name is None:
        raise ValueError(f"server {url!r} has no host; give its base URL, such as http://localhost:8000/v1")
    return name


def weights(checkpoint: Checkpoint) -> str:
    """What tells a model's weights from others of its name: their hash, an adapter's, and the dtype."""
    adapter = f", adapter {checkpoint.adapter_hash}" if checkpoint.adapter_hash else ""
    return f"{checkpoint.weight_hash}{adapter}, {checkpoint.model.dtype}"


def server_writer(url: str, settings: Settings, key: str | None = None, timeout: float = 300) -> Writer:
    """A writer over an OpenAI-compatible server's `URL/chat/completions` (vLLM, llama.cpp, a commercial one).

    Busy and failing answers (429, 5xx, a lost connection) are tried again, with waits; others raise ValueError.
    """
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {key or 'none'}"
    retry = Retry(RETRIES, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=["POST"])
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=64))

    def ask(request: Request) -> str:
        body = {
            "model": settings.writer, "messages": [{"role": "user", "content": request.prompt}], "seed": request.seed,
            "temperature": settings.temperature, "top_p": settings.top_p,
            "max_tokens": settings.max_tokens * len(request.plan),
        }  # fmt: skip
        try:
            answer = session.post(f"{url.rstrip('/')}/chat/completions", json=body, timeout=timeout)
        except requests.RequestException as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{url} does not answer ({reason}); start the server and run the same command again, it goes on"
            ) from error
        try:
            return answer.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{url} gives no chat completion (status {answer.status_code}): {answer.text[:200]!r}"
            ) from error

    return ask


def model_writer(checkpoint: Checkpoint, settings: Settings) -> Writer:
    """A writer that samples from a loaded model, one request at a time."""
    import torch

    def ask(request: Request) -> str:
        torch.manual_seed(request.seed)
        inputs = checkpoint.tokenizer.apply_chat_template(
            [{"role": "user", "content": request.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(checkpoint.model.device)
        with torch.no_grad():
            output = checkpoint.model.generate(
                **inputs, do_sample=True, temperature=settings.temperature, top_p=settings.top_p,
                top_k=0, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram_size=0,  # else the checkpoint's own
                max_new_tokens=settings.max_tokens * len(request.plan), pad_token_id=checkpoint.tokenizer.eos_token_id,
            )  # fmt: skip
        return checkpoint.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask
