"""The options of vLLM's command line and of its `LLM` that are called otherwise here, ask for what holds anyway, or cannot be had.

Launch scripts for vLLM start jaxserve with the same meaning, or are told by name what to change; docs/options.md has the list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# vLLM's name -> ours.
RENAMED: Mapping[str, str] = {
    "allowed_origins": "cors_origins",
    "async_scheduling": "overlap",
    "block_size": "page_size",
    "download_dir": "cache_dir",
    "enable_prefix_caching": "prefix_cache",
    "gpu_memory_utilization": "memory_utilization",
    "kv_cache_dtype": "cache_dtype",
    "kv_cache_memory_bytes": "cache_bytes",
    "max_model_len": "max_len",
    "max_num_batched_tokens": "max_step_tokens",
    "max_num_seqs": "max_rows",
    "num_gpu_blocks_override": "num_pages",
    "shutdown_timeout": "drain_timeout_s",
    "uvicorn_log_level": "log_level",
}
SHORT: Mapping[str, str] = {
    "tensor_parallel_size": "-tp",
    "data_parallel_size": "-dp",
    "pipeline_parallel_size": "-pp",
    "quantization": "-q",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ForeignOption:
    """An option that only vLLM has.

    Args:
      says: why nothing is to be done, or what to do instead.
      allowed: texts of the values that ask for what holds here; None if all of them do.
      is_flag: takes no value on the command line.
    """

    says: str
    allowed: tuple[str, ...] | None = None
    is_flag: bool = False

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value of the option of this name, if anything is."""
        if value is None or value in ("", [], {}, ()) or self.allowed is None or str(value).lower() in self.allowed:
            return None
        shown = "" if self.is_flag else f"={value!s:.60}"
        only = f" (only {', '.join(self.allowed)})" if self.allowed and not self.is_flag else ""
        return f"--{name.replace('_', '-')}{shown} is vLLM's and is not supported{only}: {self.says}"


def _any(says: str) -> ForeignOption:
    return ForeignOption(says)


def _flag(says: str) -> ForeignOption:
    return ForeignOption(says, is_flag=True)


def _only(says: str, *allowed: str) -> ForeignOption:
    return ForeignOption(says, allowed)


def _never(says: str) -> ForeignOption:
    return ForeignOption(says, ("false",), is_flag=True)


_TEXT_ONLY = "models take text only"
_HAS_NO_GRAPHS = "steps are compiled at start, whatever is said here"
_NO_LORA = "adapters are not served; merge them into the model"
_NO_SPECULATION = "speculative decoding is not supported yet; leave it out"
_NO_TRACES = "there are metrics and /start_profile instead; leave it out"
_OTHER_MESH = "see --mesh and docs/parallelism.md"
_TEXTS_ARE_PRIVATE = "texts of clients are never logged; leave it out"

FOREIGN: Mapping[str, ForeignOption] = {
    # What they ask for holds, or they tune what is not there.
    "aggregate_engine_logging": _flag("one process logs"),
    "allowed_local_media_path": _any(_TEXT_ONLY),
    "allowed_media_domains": _any(_TEXT_ONLY),
    "api_server_count": _any("one process answers HTTP"),
    "chat_template_content_format": _any("content goes to the template as it likes it"),
    "compilation_config": _any(_HAS_NO_GRAPHS),
    "cuda_graph_sizes": _any("see --decode-rows and --prefill-tokens"),
    "cudagraph_capture_sizes": _any("see --decode-rows and --prefill-tokens"),
    "disable_access_log_for_endpoints": _any("requests are logged with --access-log only"),
    "disable_cascade_attn": _flag("there is none"),
    "disable_custom_all_reduce": _flag("XLA has its own"),
    "disable_frontend_multiprocessing": _flag("there is one process anyway"),
    "disable_log_requests": _flag("requests are not logged anyway"),
    "disable_log_stats": _flag("figures are metrics, not log lines"),
    "disable_mm_preprocessor_cache": _flag(_TEXT_ONLY),
    "disable_uvicorn_access_log": _flag("requests are logged with --access-log only"),
    "distributed_executor_backend": _any("one process drives all devices of a host"),
    "enable_chunked_prefill": _flag("prompts longer than --max-step-tokens are always cut"),
    "enable_prompt_tokens_details": _flag("usage always has them"),
    "enable_reasoning": _flag("--reasoning-parser says it"),
    "enable_request_id_headers": _flag("every answer has an x-request-id"),
    "enable_server_load_tracking": _flag("/load always counts"),
    "enforce_eager": _flag(_HAS_NO_GRAPHS),
    "guided_decoding_backend": _any("llguidance holds answers to all kinds of forms"),
    "ignore_patterns": _any("only the files of the model's own format are read"),
    "interleave_mm_strings": _flag(_TEXT_ONLY),
    "limit_mm_per_prompt": _any(_TEXT_ONLY),
    "long_prefill_token_threshold": _any("see --max-mixed-tokens"),
    "max_cpu_loras": _any(_NO_LORA),
    "max_log_len": _any(_TEXTS_ARE_PRIVATE),
    "max_long_partial_prefills": _any("see --max-mixed-tokens"),
    "max_lora_rank": _any(_NO_LORA),
    "max_loras": _any(_NO_LORA),
    "max_num_partial_prefills": _any("see --max-mixed-tokens"),
    "max_parallel_loading_workers": _any("files are mapped, and read by as many threads as help"),
    "max_seq_len_to_capture": _any(_HAS_NO_GRAPHS),
    "mm_processor_cache_gb": _any(_TEXT_ONLY),
    "mm_processor_kwargs": _any(_TEXT_ONLY),
    "multi_step_stream_outputs": _flag("every token is streamed as it comes"),
    "num_scheduler_steps": _any("the next step is prepared while one runs: --overlap"),
    "optimization_level": _any(_HAS_NO_GRAPHS),
    "preemption_mode": _any("preempted answers are computed again, as in vLLM"),
    "prefix_caching_hash_algo": _any("it is SHA-256 with a secret of the process"),
    "safetensors_load_strategy": _any("files are mapped"),
    "scheduling_policy": _only("priorities always count, then the order of arrival", "fcfs", "priority"),
    "skip_mm_profiling": _flag(_TEXT_ONLY),
    "swap_space": _any("preempted answers are computed again, as in vLLM"),
    "tokenizer_pool_size": _any("tokenizing has its own threads"),
    "trust_remote_code": _flag("code of a model's repository is neither needed nor run"),
    "use_tqdm_on_load": _flag("/health tells how far loading is"),
    "use_v2_block_manager": _flag("it is vLLM's own affair"),
    "worker_use_ray": _flag("one process drives all devices of a host"),
    # One value of them is what there is.
    "config_format": _only("the config.json of transformers, or what a GGUF file says", "auto", "hf"),
    "cpu_offload_gb": _only("weights are on the devices", "0", "0.0"),
    "data_parallel_backend": _only(_OTHER_MESH, "mp"),
    "decode_context_parallel_size": _only(_OTHER_MESH, "1"),
    "device": _only("JAX_PLATFORMS chooses between tpu, cuda and cpu", "auto"),
    "logprobs_mode": _only("they are of the raw distribution", "raw_logprobs"),
    "max_logprobs": _only("20 is the most", "20"),
    "model_impl": _only("there is one implementation of each family", "auto", "vllm"),
    "pipeline_parallel_size": _only(_OTHER_MESH, "1"),
    "prefill_context_parallel_size": _only(_OTHER_MESH, "1"),
    "response_role": _only("answers are the assistant's", "assistant"),
    "stream_interval": _only("clients set stream_interval for themselves", "1"),
    "task": _only("use --runner pooling and --convert", "auto", "generate"),
    "tokenizer_mode": _only("tokenizers are those of transformers, or of a GGUF file", "auto", "hf"),
    # Not to be had.
    "calculate_kv_scales": _never("cached keys and values are not quantized"),
    "disable_fastapi_docs": _never("/docs and /openapi.json tell no secrets; hide them in a proxy"),
    "disable_sliding_window": _never("windows are part of the model; --max-len bounds the context"),
    "enable_expert_parallel": _never("use --mesh expert=N"),
    "enable_log_outputs": _never(_TEXTS_ARE_PRIVATE),
    "enable_log_requests": _never(_TEXTS_ARE_PRIVATE),
    "enable_lora": _never(_NO_LORA),
    "enable_prompt_embeds": _never("prompts are text or token ids"),
    "enable_sleep_mode": _never("start and stop the process instead; compiled programs are kept"),
    "exclude_tools_when_tool_choice_none": _never("tools are shown to the model unless a request leaves them out"),
    "grpc": _never("HTTP only"),
    "headless": _never("see --coordinator and docs/parallelism.md"),
    "hf_config_path": _only("put config.json beside the weights"),
    "hf_overrides": _only("change config.json in a copy of the model"),
    "hf_token": _only("set HF_TOKEN in the environment"),
    "io_processor_plugin": _only("there are no plugins"),
    "kv_events_config": _only("there are none"),
    "kv_transfer_config": _only("caches stay where they are"),
    "logits_processors": _only("use logit_bias, bad_words, allowed_token_ids or structured_outputs"),
    "lora_modules": _only(_NO_LORA),
    "middleware": _only("put a proxy in front"),
    "otlp_traces_endpoint": _only(_NO_TRACES),
    "collect_detailed_traces": _only(_NO_TRACES),
    "quantization": _only("it is read from the model's files; leave it out"),
    "reasoning_parser_plugin": _only("there are no plugins; see --reasoning-parser"),
    "return_tokens_as_token_ids": _never("clients ask for it in their requests"),
    "rope_scaling": _only("change config.json in a copy of the model"),
    "rope_theta": _only("change config.json in a copy of the model"),
    "skip_tokenizer_init": _never("texts cannot be read without one"),
    "speculative_config": _only(_NO_SPECULATION),
    "speculative_model": _only(_NO_SPECULATION),
    "num_speculative_tokens": _only(_NO_SPECULATION),
    "structured_outputs_config": _only("llguidance holds answers to all kinds of forms; leave it out"),
    "tokenizer_revision": _only("it is that of --revision"),
    "tool_parser_plugin": _only("there are no plugins; see --tool-call-parser"),
    "trust_request_chat_template": _never("templates come from the model or from --chat-template"),
    "uds": _only("use --host and --port, and a proxy for a socket"),
}
