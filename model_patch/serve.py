"""transformers' OpenAI-compatible server over one checkpoint, loaded by `load_model` and accelerated."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.import_utils import is_serve_available

from model_patch.checkpoint.reader import read_config
from model_patch.errors import CheckpointError, ConfigError, UnsupportedModelError
from model_patch.load import find_checkpoint, load_tokenizer

Load = Callable[[], PreTrainedModel]
_LOG = logging.getLogger(__name__)


def serve(source: str, load: Load, *, host: str, port: int, continuous_batching: bool = False) -> None:
    """Load the model, answer requests on http://host:port/v1 until interrupted.

    source: a folder or Hub name, under which the model is listed; load: gives the model, in the state that it is to
    be served in. One request is decoded at a time, others wait; with continuous_batching, those that transformers can
    batch are decoded together.

    Raises ConfigError when the packages of the server are missing, CheckpointError for a checkpoint without chat
    template or processor, UnsupportedModelError for continuous batching of GatedDeltaNet.
    """
    check_servable(source, continuous_batching)
    if not is_serve_available():
        raise ConfigError("the server needs more packages: pip install 'polar-kernels[serve]'")
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager, server

    manager, build = model_manager.ModelManager, server.build_server
    # The server makes both itself; this is where it looks them up.
    model_manager.ModelManager, server.build_server = _manager(manager, source, load), _answering(build)
    try:
        Serve(force_model=source, host=host, port=port, continuous_batching=continuous_batching)
    finally:
        model_manager.ModelManager, server.build_server = manager, build


def check_servable(source: str, continuous_batching: bool) -> None:
    """Raise the errors of `serve` that need no model."""
    folder = find_checkpoint(source)
    text = read_config(folder)
    text = text.get("text_config", text)
    if continuous_batching and "linear_attention" in text.get("layer_types", ()):
        raise UnsupportedModelError(
            "continuous batching in transformers knows no GatedDeltaNet (Qwen3.5): serve without --continuous-batching"
        )
    if not load_tokenizer(source).chat_template:
        problem = "its tokenizer has no chat template (chat_template.jinja), which the server needs"
        raise CheckpointError(folder, problem)


def _manager(base: type, source: str, load: Load) -> type:
    """The server's model manager, of this one model."""

    class ModelManager(base):
        def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
            return load()

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super()._load_processor(*args, **kwargs)
            except (ImportError, OSError, ValueError) as error:
                raise CheckpointError(source, f"no processor could be loaded: {str(error).splitlines()[0]}") from error

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            # Some versions of transformers list what is in the Hub's cache, whatever is served.
            return [{"owned_by": "", "id": source, "object": "model", "created": 0}]

    return ModelManager


def _answering(build: Callable[..., Any]) -> Callable[..., Any]:
    """A `build_server` whose server tells what is wrong with a request, in place of 500 and a traceback."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    async def bad_request(request: Request, error: Exception) -> JSONResponse:
        # It may as well be a fault of ours, which the log then tells from the client's.
        _LOG.warning("refused a request: %s", error, exc_info=error)
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        return JSONResponse({"error": {"message": what, "type": "invalid_request_error"}}, status_code=400)

    def build_server(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        for kind in (KeyError, TypeError, ValueError):  # what transformers raises for values that it cannot use
            app.add_exception_handler(kind, bad_request)
        return app

    return build_server
