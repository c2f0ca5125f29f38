"""Load language models: frozen models, a policy's initial model, the target; their device and dtype."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignpro.config import ModelConfig, PolicyConfig
from alignpro.errors import ModelError
from alignpro.models.cpu.packed_linear import no_kernels
from alignpro.models.cpu.wide_states import obstacle
from alignpro.models.language_model import LanguageModel
from alignpro.models.merging import merge_adapter
from alignpro.models.mixed_model import combine, share_equal_weights
from alignpro.models.mixture_files import MIXTURE_FILE, Mixture, read_mixture
from alignpro.models.peft_types import is_peft_model
from alignpro.models.pickled_files import describe_refusal
from alignpro.models.saving import BASE_DIRECTORY
from alignpro.models.unused_weights import refuse_other_model
from alignpro.prompting.pretrained import require_pretrained
from alignpro.prompting.tokenization import load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(device: str) -> torch.device:
    """Resolve a device name; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        ModelError: The device is not available.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # torch built without that backend asserts
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"device {device}: cannot be used: {reason}; set device to auto, cpu or cuda:N") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def resolve_dtype(config: ModelConfig, *, widened: bool = True) -> torch.dtype:
    """Resolve the dtype of a model's weights.

    ``auto`` is the dtype in which its files are, as its config.json says. On a CPU it is bfloat16 only where the files are
    and products read them as they are: then nothing is rounded, and generation reads half as much. Otherwise it is float32.

    Args:
        config: The model; an adapter has the dtype of its base.
        widened: Whether its states are float32 on a CPU where its weights are bfloat16; otherwise it computes in their dtype.

    Raises:
        ModelError: ``auto`` needs its config.json, which cannot be read.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    with _loading_errors(config.path):
        stored = _stored_config(config).dtype
    if resolve_device(config.device).type != "cpu":
        return stored if stored in DTYPES.values() else torch.float32
    narrow = widened and stored == torch.bfloat16 and no_kernels() is None
    return torch.bfloat16 if narrow else torch.float32


def stored_context(config: ModelConfig) -> int | None:
    """The context of a model that is not loaded, as the config.json of it, or of its adapter's base, tells; None if it does not.

    Raises:
        ModelError: Its config.json cannot be read.
    """
    with _loading_errors(config.path):
        text = _stored_config(config).get_text_config()
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found


def _stored_config(config: ModelConfig) -> Any:
    path = config.path
    while is_adapter(path):
        path = base_of_adapter(Path(path))
    return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def load_language_model(config: ModelConfig) -> LanguageModel:
    """Load a frozen model and its tokenizer, by name or directory; for a peft adapter's directory, with its base model.

    Of a mixture's directory, its parts are loaded.

    Raises:
        ModelError: There is no such model, it is not a causal language model, or it has no usable tokenizer.
    """
    if (mixture := read_mixture(config.path)) is not None:
        return load_mixture(mixture, config)
    language_model = LanguageModel(load_causal(config), load_tokenizer(config), config.path)
    return language_model.requires_grad_(False).eval()


def load_mixture(mixture: Mixture, config: ModelConfig) -> LanguageModel:
    """Load a mixture of models; those of weight 0 are not loaded, and equal weights of different models are held once.

    Args:
        mixture: The parts.
        config: How they are loaded, and the tokenizer of the mixture.

    Raises:
        ModelError: As `load_language_model`, or the parts cannot be mixed; see `MixedModel`.
    """

    def load(path: str) -> LanguageModel:
        return load_language_model(config.model_copy(update={"path": path, "tokenizer": None}))

    weighed = [(path, weight) for path, weight in zip(mixture.prompters, mixture.weights, strict=True) if weight != 0]
    parts = [(load(path), weight) for path, weight in weighed]
    if rest := mixture.reference_weight:
        if mixture.reference is not None:
            reference = load(mixture.reference)
        else:
            reference = (parts[0][0] if parts else load(mixture.prompters[0])).without_adapter()
        parts.append((reference, rest))
    share_equal_weights([part for part, _ in parts])
    mixed = combine(parts, config.path)
    mixed.tokenizer = load_tokenizer(config)
    return mixed


def load_target(
    config: ModelConfig | str,
    adapted: LanguageModel | None,
    load: Callable[[ModelConfig], LanguageModel] = load_language_model,
) -> LanguageModel:
    """Load the frozen target: a separate model, or, if ``config`` is a string, the base model below ``adapted``'s LoRA.

    Args:
        config: The target's configuration, or the string that refers to ``adapted``.
        adapted: The policy or prompter.
        load: Loads a separate model.

    Raises:
        ModelError: As `load_language_model`, or ``adapted`` has no LoRA that can be switched off per token.
    """
    if not isinstance(config, str):
        return load(config)
    assert adapted is not None  # a configuration that refers to it names it
    return adapted.without_adapter()


def load_trainable(config: PolicyConfig, seed: int) -> LanguageModel:
    """Load a policy's initial model; with ``from_scratch``, initialise it with random weights drawn from ``seed``.

    Of a peft adapter's directory, the weights that peft trains have a gradient.

    Raises:
        ModelError: As `load_language_model`.
    """
    torch.manual_seed(seed)  # also for what the caller draws next, such as an adapter's initial weights
    if not config.from_scratch:
        return LanguageModel(load_causal(config, trainable=True), load_tokenizer(config), config.path).eval()
    tokenizer = load_tokenizer(config)
    with _loading_errors(config.path):
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=resolve_dtype(config),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
    model.name_or_path = BASE_DIRECTORY
    return LanguageModel(model.to(resolve_device(config.device)), tokenizer, config.path)


def is_activated_lora(directory: str) -> bool:
    """Whether a saved adapter is an activated LoRA."""
    from peft import PeftConfig

    with _loading_errors(directory):
        return getattr(PeftConfig.from_pretrained(directory), "alora_invocation_tokens", None) is not None


def is_adapter(path: str) -> bool:
    """Whether a directory holds a peft adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def base_of_adapter(directory: Path) -> str:
    """Return the path of the base model of a peft adapter: that which is saved with it, else the one that it names.

    Raises:
        ValueError: It names none.
    """
    if (directory / BASE_DIRECTORY).is_dir():  # its path is another if the directory has been moved
        return str(directory / BASE_DIRECTORY)
    from peft import PeftConfig

    named: str | None = PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    if not named:
        raise ValueError("its adapter_config.json has no base_model_name_or_path")
    return named


def load_causal(config: ModelConfig, *, trainable: bool = False) -> PreTrainedModel | PeftModel:
    """Load a causal language model, or an adapter on its base model, as transformers and peft have it.

    Args:
        config: The model.
        trainable: Whether the weights of an adapter get a gradient.

    Raises:
        ModelError: There is no such model, or it is not a causal language model.
    """
    require_pretrained(config.path)
    directory = Path(config.path)
    if (directory / MIXTURE_FILE).is_file():
        raise ModelError(
            f"model {config.path}: it is a mixture of models, which rewrites and is evaluated, but is neither trained nor "
            "exported: name one of its prompters, or write one model with `alignpro mix --one-model`"
        )
    with _loading_errors(config.path):
        if is_adapter(config.path):
            return _load_adapter(config, directory, trainable=trainable)
        dtype = resolve_dtype(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} weights, such as {missing[0]}")
        refuse_other_model(model, report["unexpected_keys"])
    settle_dtype(model, config)
    return model.to(resolve_device(config.device))


def settle_dtype(model: PreTrainedModel, config: ModelConfig) -> None:
    """Make a model of ``dtype: auto`` float32 if its bfloat16 weights cannot be read as they are on a CPU; log what it is.

    Args:
        model: The model, as it was loaded with `resolve_dtype`.
        config: Its configuration.
    """
    if config.dtype != "auto":
        return
    device = resolve_device(config.device)
    if device.type == "cpu" and model.dtype == torch.bfloat16 and obstacle(model) is not None:
        model.float()
    logger.info("%s: dtype=auto is %s on %s", config.path, str(model.dtype).removeprefix("torch."), device.type)


def _load_adapter(config: ModelConfig, directory: Path, *, trainable: bool) -> PeftModel:
    """Load an adapter on its base model; if that is an adapter too, it is merged."""
    from peft import PeftConfig, PeftModel

    adapter = PeftConfig.from_pretrained(config.path)
    if getattr(adapter, "megatron_config", None):
        raise ValueError("its adapter_config.json has a megatron_config, for which peft imports any module it names")
    soft, path = adapter.is_prompt_learning, base_of_adapter(directory)
    base = load_causal(config.model_copy(update={"path": path}))
    if merged := is_peft_model(base):
        base = merge_adapter(base, path)
    model = PeftModel.from_pretrained(base, config.path, is_trainable=trainable and not soft)
    if soft:  # which peft loads frozen only
        model.prompt_encoder.requires_grad_(trainable)
    if merged or path == str(directory / BASE_DIRECTORY):
        model.active_peft_config.base_model_name_or_path = BASE_DIRECTORY
    return model


@contextmanager
def _loading_errors(path: str) -> Iterator[None]:
    """Add the model's name to loading errors; transformers' own messages say why it failed."""
    try:
        yield
    except AssertionError as error:  # of torch: transformers' embeddings take the pad id as it is
        raise ModelError(
            f"model {path}: its config.json names a pad_token_id beyond its vocabulary: {error}"
        ) from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        hint = " (here: attention=eager)" if 'attn_implementation="eager"' in str(error) else ""
        raise ModelError(f"model {path}: cannot be loaded as a causal language model: {error}{hint}") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"model {path}: {describe_refusal(path, error)}") from error
