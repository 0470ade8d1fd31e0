"""One frozen model in memory, an adapter for each job, and requests that say which they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft

import fused_lora
from examples.product_copy.data import Example
from examples.product_copy.errors import DemoError
from examples.shop.jobs import JOBS
from examples.shop.language_model import LanguageModel
from examples.shop.tuning import ADAPTER


@dataclass(frozen=True)
class Shop:
    language: LanguageModel
    jobs: tuple[str, ...]

    @classmethod
    def load(cls, model: Path, out: Path) -> Shop:
        """The model with the adapters of the jobs that were tuned into `out`."""
        folders = {name: out / name / ADAPTER for name in JOBS if (out / name / ADAPTER).is_dir()}
        if not folders:
            raise DemoError(
                f"--out {out}: no job was tuned there yet; python -m examples.shop support tunes one"
            )
        language = LanguageModel.load(model)
        for name, folder in folders.items():
            if isinstance(language.model, peft.PeftModel):
                language.model.load_adapter(str(folder), adapter_name=name)
            else:
                language.model = peft.PeftModel.from_pretrained(language.model, folder, adapter_name=name)
        fused_lora.fuse(language.model)
        return cls(language, tuple(folders))

    def answer(self, request: str) -> str:
        """The answer to "JOB: TEXT", where \\n begins a line of the text, by the job's adapter; or what is
        wrong with the request."""
        name, _, text = (part.strip() for part in request.partition(":"))
        if name not in self.jobs or not text:
            return f"? a request is JOB: TEXT, with a job of {', '.join(self.jobs)}; got {request!r}"
        job = JOBS[name]
        self.language.model.set_adapter(name)
        try:
            prompt = job.prompt(text.replace("\\n", "\n"))
            example = Example(title=name, prompt=prompt, completion="", heldout=True, line=1)
            return self.language.write([example], job.longest)[0]
        except DemoError as error:  # a request that cannot be answered must not end the service
            return f"? {error}"
