"""The guards of input hardening and of the state machine: switched off, each must turn a named test red.

`text` stands in `file` (below `holoray/`) exactly once; `off` takes its place. `test` is a file and a name below
`tests/`. A table: one guard a line, however long.
"""

# ruff: noqa: E501
from __future__ import annotations

from typing import Final, NamedTuple


class Guard(NamedTuple):
    file: str
    text: str
    off: str
    test: str


_MANIFEST = "test_manifest.py::"
_FRAGMENTS = _MANIFEST + "test_impossible_fragments"
_TENSORS = _MANIFEST + "test_impossible_tensors"
_LISTS = _MANIFEST + "test_lists_that_contradict_themselves"
_LOAD = "pipelines/test_load.py::"
_DAMAGED = "hardening/test_damaged_stores.py::"
_SPLICES = "hardening/test_splices.py::"
_NAMES = "hardening/test_names.py::"
_FORGERY = "hardening/test_forgery.py::"
_ON_DEVICE = "cuda/test_frames.py::"
_BOMB = "hardening/test_bombs.py::test_bomb"
_FRAMES = "test_compression.py::test_frames_that_hide_their_size_or_carry_more"
_LIES = "formats/test_safetensors.py::test_lies_are_format_errors"
_FULL = "hardening/test_full_disk.py::"
_KILLS = "hardening/test_killed_encodes.py::test_kills_at_some_steps_and_random_moments"
_HTTP = "stores/test_hostile_http.py::"
_BOOK = "pipelines/test_source_policy.py::"
_POOL = "pipelines/test_source_pool.py::"
_STATE = "actors/test_state.py::"
_LOSSES = "actors/test_losses.py::"
_DEVICE_LOAD = "cuda/test_device_load.py::"
_OPENED = "cuda/test_device_frames.py::"

INTEGRITY: Final = (
    Guard("integrity.py", "if size != entry.stored_bytes:", "if False:", _LOAD + "test_a_short_payload_is_told_as_one"),
    Guard("integrity.py", "xxh3_64_intdigest(data) != entry.xxh3_64", "xxh3_64_intdigest(data) < 0", _LOAD + "test_a_damaged_fragment_is_named"),
    Guard("integrity.py", "if strict and hashlib", "if False and hashlib", _FORGERY + "test_a_load_of_a_pinned_root_refuses_it"),
    Guard("integrity.py", "if why is not None:", "if False:", _SPLICES + "test_a_load_names_the_fragment_that_was_replaced"),
    Guard("integrity.py", "not root.startswith(ROOT_PREFIX) or", "", _SPLICES + "test_nothing_but_sha256_can_be_expected"),
    Guard("integrity.py", "len(digits) != 64 or", "", _SPLICES + "test_a_root_of_another_kind_is_refused"),
    Guard("integrity.py", 'or set(digits) - set("0123456789abcdef")', "", _SPLICES + "test_nothing_but_sha256_can_be_expected"),
    Guard("pipelines/sealed_store.py", "expect is not None or self.store.remote", "self.store.remote", _FORGERY + "test_a_load_of_a_pinned_root_refuses_it"),
    Guard("pipelines/sealed_store.py", "expect is not None or self.store.remote", "expect is not None", _FORGERY + "test_a_load_over_a_network_refuses_it"),
    Guard("pipelines/sealed_store.py", "if expect is not None and self.root != parse_root", "if False and parse_root", _LOAD + "test_the_root_is_checked"),
    Guard("pipelines/sealed_store.py", "if format_root(encoded) != self.root:", "if False:", _DAMAGED + "test_every_bit_of_root_and_manifest_is_sealed"),
    Guard("stores/root.py", 'if not text.endswith(b"\\n"):', "if False:", _SPLICES + "test_a_root_of_another_kind_is_refused"),
    Guard("stores/root.py", "if parse_root(root) != root:", "if False:", _SPLICES + "test_a_root_of_another_kind_is_refused"),
    Guard("pipelines/fragment_pipeline.py", "if wrong and not self._skip_corrupted:", "if False:", _LOAD + "test_a_damaged_fragment_is_named"),
    Guard("pipelines/fragment_pipeline.py", "opened[done:], strict=True):\n                accumulator.discard(unit.slot)", "opened[done:], strict=True):\n                pass", _LOAD + "test_what_was_read_in_place_and_was_bad_is_not_kept"),
    Guard("stores/base.py", "                    wrong[part.member] = error", "                    pass", _LOAD + "test_a_bad_fragment_that_is_read_in_place_is_named"),
    Guard("stores/base.py", "max(part.start, min(part.stop, got))", "part.stop", _LOAD + "test_a_short_payload_is_told_as_one"),
    Guard("pipelines/fragment_pipeline.py", "                check_integrity(name,", "                str(name) or check_integrity(name,", _LOAD + "test_a_damaged_fragment_is_named"),
    Guard("pipelines/tensor_codec.py", "check_integrity(self.entry.name, known, fragment.payload, strict=True)", "pass", _FORGERY + "test_a_decoder_refuses_it"),
    Guard("pipelines/tensor_codec.py", "fragment.tensor != self.entry.name or", "", "test_parity.py::test_a_bad_fragment_changes_nothing"),
    Guard("pipelines/verify.py", "if size < file.bytes:", "if False:", _LOAD + "test_missing_and_short_files"),
    Guard("pipelines/verify.py", "if size != file.bytes:", "if False:", _LOAD + "test_missing_and_short_files"),
    Guard("pipelines/verify.py", "if framing.fault or framing.digest.hexdigest() != file.framing_sha256:", "if False:", _DAMAGED + "test_verify_names_the_file_of_flipped_bits"),
    Guard("pipelines/verify.py", "fault(entry, payload, strict=True)", "fault(entry, payload, strict=False)", _FORGERY + "test_verify_names_the_forged_fragment"),
    Guard("stores/base.py", "if size > limit:", "if False:", "stores/test_store_conformance.py::test_limits_are_checked_before_reading"),
    Guard("stores/base.py", "return _NAME.fullmatch(name) is not None", "return True", "stores/test_store_conformance.py::test_only_plain_names_are_written"),
    Guard("files.py", " | os.O_NONBLOCK", "", "hardening/test_changing_files.py::test_links_to_anything_else_are_refused"),
    Guard("files.py", "if not stat.S_ISREG(os.fstat(file).st_mode):", "if False:", "hardening/test_changing_files.py::test_links_to_anything_else_are_refused"),
)  # fmt: skip

MANIFEST: Final = (
    Guard("manifest.py", "if len(encoded) > MAX_MANIFEST_BYTES:", "if False:", _MANIFEST + "test_a_manifest_beyond_the_limit"),
    Guard("manifest.py", "reader.num_record_batches != 1 or", "", _MANIFEST + "test_two_record_batches_are_refused"),
    Guard("manifest.py", "or not reader.schema.equals(SCHEMA, check_metadata=False)", "", _MANIFEST + "test_other_schemas"),
    Guard("manifest.py", "batch.validate(full=True)", "batch.validate()", _MANIFEST + "test_offsets_of_arrow_that_lead_out_of_its_buffers"),
    Guard("manifest.py", 'if header.get("format") != FORMAT:', "if False:", _SPLICES + "test_other_formats_are_refused"),
    Guard("manifest.py", "if any(column.null_count for column in batch.columns):", "if False:", _MANIFEST + "test_null_values_are_refused"),
    Guard("manifest.py", " or _is_compressed(memoryview(message.metadata))", "", _BOMB),
    Guard("manifest.py", "except RecursionError:", "except ZeroDivisionError:", _MANIFEST + "test_malformed_headers"),
    Guard("manifest.py", "math.prod(max(d, 1) for d in spec.shape)", "math.prod(d for d in spec.shape)", _NAMES + "test_shapes_that_nothing_can_hold_are_refused"),
    Guard("manifest.py", "except UnicodeEncodeError:", "except ZeroDivisionError:", _NAMES + "test_texts_of_a_checkpoint_file_are_checked_before_any_work"),
    Guard("manifest.py", 'if len(row["config"]) > MAX_CONFIG_BYTES:', "if False:", _MANIFEST + "test_a_configuration_beyond_the_limit"),
    Guard("manifest.py", "if not isinstance(value, dict):", "if False:", _MANIFEST + "test_malformed_headers"),
    Guard("manifest.py", "if type(entry.number) is not int or type(entry.bytes) is not int or type(entry.framing_sha256) is not str:", "if False:", _MANIFEST + "test_malformed_lists_of_files"),
    Guard("manifest.py", "if not 0 <= entry.number < 1 << 31 or entry.bytes < 0:", "if False:", _MANIFEST + "test_malformed_lists_of_files"),
    Guard("manifest.py", "if len(sizes) != len(manifest.files):", "if False:", _LISTS),
    Guard("manifest.py", "if len(manifest.by_name) != len(manifest.tensors):", "if False:", _NAMES + "test_a_manifest_with_an_impossible_name_is_refused"),
    Guard("manifest.py", "    _check_energy(manifest.tensors)", "    pass", _MANIFEST + "test_gains_that_overflow_together"),
    Guard("manifest.py", "    _check_ranges(manifest.tensors)", "    pass", _LISTS),
    Guard("manifest.py", "    _check_order(manifest.tensors)", "    pass", _MANIFEST + "test_streaming_before_a_prerequisite"),
    Guard("manifest.py", "    check_storable(tensor.spec)", "    pass", _BOMB),
    Guard("manifest.py", "if tensor.spec.nbytes > (tensor.stored_bytes + 16) * MAX_EXPANSION:", "if False:", _MANIFEST + "test_a_tensor_that_claims_too_much_is_a_bomb"),
    Guard("manifest.py", "    check_entry(codec, tensor)", "    pass", _FRAGMENTS),
    Guard("manifest.py", "tensor.residual < 0 or", "", _TENSORS),
    Guard("manifest.py", "if not 0.0 <= tensor.essential_gain <= (math.inf if codec.carries_essential else 0.0):", "if False:", _TENSORS),
    Guard("manifest.py", "inside and known", "known", _FRAGMENTS),
    Guard("manifest.py", " or not math.isfinite(tensor.energy)", "", _TENSORS),
    Guard("manifest.py", "0 <= fragment.offset <=", "fragment.offset <=", _MANIFEST + "test_an_impossible_fragment_that_is_alone"),
    Guard("manifest.py", " and fragment.stored_bytes >= 0", "", _MANIFEST + "test_an_impossible_fragment_that_is_alone"),
    Guard("manifest.py", "inside and known", "inside", _FRAGMENTS),
    Guard("manifest.py", "known and same", "known", _MANIFEST + "test_an_impossible_fragment_that_is_alone"),
    Guard("manifest.py", "if sorted(places) != list(range(len(places))):", "if False:", _FRAGMENTS),
    Guard("manifest.py", "tensor.fragments[requires].order > fragment.order", "False", _MANIFEST + "test_streaming_before_a_prerequisite"),
    Guard("tensor.py", "if self.dtype not in DTYPES:", "if False:", _LIES),
    Guard("tensor.py", "if not self.name or len", "if len", _NAMES + "test_names_that_nothing_can_hold_are_refused_when_encoding"),
    Guard("tensor.py", "> MAX_NAME_BYTES:", "> 1 << 40:", _NAMES + "test_names_that_nothing_can_hold_are_refused_when_encoding"),
    Guard("tensor.py", "if self.name == RESERVED_NAME:", "if False:", "formats/test_safetensors.py::test_no_tensor_is_called_like_the_metadata"),
    Guard("tensor.py", "len(self.shape) > MAX_RANK or", "", _BOMB),
    Guard("tensor.py", "if self.nbytes > MAX_TENSOR_BYTES or", "if", "formats/test_safetensors.py::test_no_tensor_is_larger_than_any_memory"),
)  # fmt: skip

PAYLOADS: Final = (
    Guard("kernels/frames.py", "stated != size or size == 0", "False", _ON_DEVICE + "test_what_is_no_whole_frame_of_its_size_never_reaches_a_decoder"),
    Guard("kernels/frames.py", "if not last or at + (_CHECKSUM if parameters.has_checksum else 0) != view.nbytes:", "if False:", _ON_DEVICE + "test_what_is_no_whole_frame_of_its_size_never_reaches_a_decoder"),
    Guard("kernels/frames.py", "if list(got) != list(raw_bytes):", "if False:", _ON_DEVICE + "test_a_frame_that_yields_another_size_than_it_states_is_refused"),
    Guard("compression.py", "if memoryview(data).nbytes != raw_bytes:", "if False:", _FRAMES),
    Guard("compression.py", "if zstandard.frame_content_size(data) != raw_bytes:", "if False:", _BOMB),
    Guard("compression.py", ", allow_extra_data=False", "", _FRAMES),
    Guard("compression.py", "except (zstandard.ZstdError, pa.ArrowException, OSError) as error:", "except ZeroDivisionError as error:", _FRAMES),
    Guard("compression.py", "if len(raw) != raw_bytes:", "if False:", "test_compression.py::test_other_sizes_than_promised"),
    Guard("compression.py", "if raw_bytes > memoryview(data).nbytes * _LZ4_MAX_RATIO:", "if False:", "test_compression.py::test_other_sizes_than_promised"),
    Guard("formats/safetensors.py", "if length > MAX_HEADER_BYTES:", "if False:", "formats/test_safetensors.py::test_absurd_header_lengths"),
    Guard("formats/safetensors.py", "if length > self._size - 8:", "if False:", "formats/test_safetensors.py::test_absurd_header_lengths"),
    Guard("formats/safetensors.py", "if len(out) != len(pairs):", "if False:", _LIES),
    Guard("formats/safetensors.py", "start != position or", "", _LIES),
    Guard("formats/safetensors.py", " or end - start != spec.nbytes", "", _LIES),
    Guard("formats/safetensors.py", "if position > data_bytes:", "if False:", "formats/test_safetensors.py::test_every_truncation_is_refused"),
    Guard("formats/safetensors.py", "if position < data_bytes:", "if False:", _LIES),
    Guard("formats/safetensors.py", 'value.keys() != {"dtype", "shape", "data_offsets"} or', "", _LIES),
    Guard("formats/safetensors.py", "type(n) is not int or", "", _LIES),
    Guard("checkpoint.py", 'file != os.path.basename(file) or', "", "test_checkpoint.py::test_shards_never_leave_the_directory"),
    Guard("checkpoint.py", "        if missing:", "        if False:", "test_checkpoint.py::test_incomplete_downloads_are_named"),
    Guard("checkpoint.py", "if spec.name in self._home:", "if False:", "test_checkpoint.py::test_a_tensor_in_two_shards"),
)  # fmt: skip

WRITING: Final = (
    Guard("stores/local.py", "            self._end_takeover()", "            pass", _KILLS),
    Guard("stores/local.py", "key=lambda n: n == ROOT", "key=lambda n: n != ROOT", "hardening/test_killed_encodes.py::test_a_store_that_is_half_replaced_is_none"),
    Guard("stores/local.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH", "stores/test_store_conformance.py::test_another_process_holds_the_lock"),
    Guard("stores/local.py", "if error.errno in NO_ROOM:", "if False:", _FULL + "test_a_disk_that_is_full_from_each_step_of_an_encode_on"),
    Guard("formats/safetensors.py", "error.errno in NO_ROOM", "False", _FULL + "test_a_disk_that_is_full_at_each_step_of_a_load"),
    Guard("formats/safetensors.py", "            os.posix_fallocate(self._file.fileno(), 0, self._bytes)", "            pass", _FULL + "test_a_disk_that_is_full_at_each_step_of_a_load"),
    Guard("pipelines/store_writer.py", "        read_manifest(manifest.encoded)", "        #", "hardening/test_names.py::test_what_cannot_be_read_back_is_not_sealed"),
    Guard("pipelines/store_writer.py", "manifest.metadata.get(_IDENTITY) != self._identity or", "", "pipelines/test_encode.py::test_journals_of_another_encode_are_not_taken"),
    Guard("pipelines/store_writer.py", "if not whole or", "if", "pipelines/test_encode.py::test_a_journal_whose_files_are_not_whole_is_not_taken"),
)  # fmt: skip

_DEQUANTISE = "pipelines/test_dequantise.py::"
_QUANTISED = "formats/test_quantised.py::"
_ON_DEVICE_TOO = "cuda/test_device_dequantise.py::"
QUANTISED: Final = (
    Guard("kernels/dequant.py", "if order.min() < 0 or order.max() >= packing.groups:", "if False:", "cuda/test_dequant.py::test_groups_that_do_not_exist_are_found_before_they_are_read"),
    Guard("kernels/dequant.py", "array.shape != shape or", "", "cuda/test_dequant.py::test_arrays_that_do_not_fit_are_refused"),
    Guard("kernels/dequant.py", " or not array.flags.c_contiguous", "", "cuda/test_dequant.py::test_arrays_that_do_not_fit_are_refused"),
    Guard("formats/quantised.py", "if size > _MAX_CONFIG_BYTES:", "if False:", _QUANTISED + "test_an_absurdly_large_configuration_is_not_read"),
    Guard("formats/quantised.py", "spec.shape != shape or", "", _QUANTISED + "test_what_is_no_layer_is_told"),
    Guard("formats/quantised.py", "if packing.rows % per_word:", "if False:", _QUANTISED + "test_what_is_no_layer_is_told"),
    Guard("pipelines/dequantise.py", "            raise fault", "            pass", _DEQUANTISE + "test_a_layer_that_lacks_a_tensor_is_told_before_anything_is_read"),
    Guard("pipelines/dequantise.py", "not self._check or hashlib", "True or hashlib", _DEQUANTISE + "test_a_layer_with_a_corrupt_tensor_is_zeros"),
    Guard("pipelines/dequantise.py", "return sorted(work, key=place)", "return work", _DEQUANTISE + "test_few_layers_are_in_memory_at_a_time"),
    Guard("pipelines/device_layers.py", "if nbytes + more > self._stage_bytes:", "if False:", _ON_DEVICE_TOO + "test_no_more_than_the_largest_layer_lies_beside_the_weights"),
    Guard("pipelines/device_layers.py", "staying + self._stage_bytes, manifest", "staying, manifest", _ON_DEVICE_TOO + "test_no_more_than_the_largest_layer_lies_beside_the_weights"),
    Guard("pipelines/device_layers.py", "min(staying // _STAGE_SHARE, spare)", "staying // _STAGE_SHARE", _ON_DEVICE_TOO + "test_stages_are_a_small_share_of_the_weights_where_there_is_room"),
    Guard("pipelines/device_layers.py", "if all(self._is_whole(name, held) for name in layer.tensors):", "if set(layer.tensors) <= parts.keys():", _ON_DEVICE_TOO + "test_a_layer_with_a_corrupt_tensor_stays_zeros"),
    Guard("pipelines/device_layers.py", "with self._memory.device.shared():", "if True:", _ON_DEVICE_TOO + "test_weights_are_those_of_the_host_and_of_what_was_packed"),
    Guard("pipelines/dequantise.py", "return not tensors[at].mandatory, at", "return not tensors[unit.tensor].mandatory, at", _ON_DEVICE_TOO + "test_a_layer_that_is_not_whole_stays_zeros"),
    Guard("pipelines/encode.py", "array if whole else self._policy.cast", "self._policy.cast", _DEQUANTISE + "test_a_cast_of_the_checkpoint_leaves_scales_alone"),
    Guard("pipelines/encode.py", "mandatory = whole or is_mandatory", "mandatory = is_mandatory", _DEQUANTISE + "test_layers_are_stored_raw_and_first_and_are_no_larger"),
)  # fmt: skip

STATE: Final = (
    Guard("actors/state.py", "if state is None or epoch not in state.flying:", "if state is None:", _STATE + "test_stale_and_repeated_answers_are_ignored"),
    Guard("actors/state.py", "if generation == self._awaited:", "if True:", _STATE + "test_only_the_awaited_generation_is_taken"),
    Guard("actors/state.py", "        if worker in self._lost:\n            return", "        if False:\n            return", _STATE + "test_stale_and_repeated_answers_are_ignored"),
    Guard("actors/state.py", "if self._restarts <= self.policy.max_restarts:", "if True:", _STATE + "test_restarts_are_bounded"),
    Guard("actors/state.py", "not transient or task", "task", _STATE + "test_what_cannot_be_cured_ends_at_once"),
    Guard("actors/state.py", "or task.attempts + 1 >= self.policy.max_attempts", "", _STATE + "test_what_keeps_failing_ends_with_its_own_error"),
    Guard("actors/state.py", "self._now - min(begun) > self.policy.task_timeout_s", "False", _STATE + "test_a_silent_worker_is_replaced"),
    Guard("actors/state.py", "self._now - self._lonely_since > self.policy.patience_s", "False", _STATE + "test_no_workers_for_too_long"),
    Guard("actors/state.py", "            self._lonely_since = None", "            pass", _STATE + "test_patience_starts_again_with_a_worker"),
    Guard("actors/state.py", "self._now = max(self._now, event.now)", "self._now = event.now", _STATE + "test_a_clock_that_jumps_back_changes_nothing"),
    Guard("actors/state.py", "        if not self.done:\n            self._said", "        if True:\n            self._said", _STATE + "test_it_gives_up_once_and_asks_for_nothing_more"),
    Guard("actors/state.py", "if worker in self._workers or worker in self._lost:", "if worker in self._workers:", _STATE + "test_the_dead_do_not_join_again"),
    Guard("actors/state.py", "self._now - state.heard > self.policy.silence_s", "False", _STATE + "test_a_stopped_worker_is_replaced_though_its_task_may_take_long"),
    Guard("actors/crew.py", "            if silent:", "            if False:", "actors/test_crew.py::test_only_who_is_silent_is_ended_by_force"),
    Guard("actors/crew.py", "        self._call_roll()\n", "", "actors/test_crew.py::test_who_died_with_the_coordinator_is_replaced_before_the_next_one_asks"),
    Guard("actors/locks.py", "with locked(guard, wait=False):", "with locked(guard):", "actors/test_locks.py::test_nobody_waits_for_a_foreign_job_that_is_stopped_while_it_joins"),
    Guard("actors/locks.py", "if is_held(path):  # so", "if True:  # so", "actors/test_locks.py::test_who_holds_a_lock_can_be_ended_though_it_is_stopped"),
    Guard("actors/state.py", "if not listened:", "if False:", _STATE + "test_who_slept_does_not_blame_the_others"),
    Guard("actors/state.py", "self._awaited is None and not self._muster:", "self._awaited is None:", _STATE + "test_nothing_is_asked_before_every_worker_has_left_the_dead_coordinator"),
    Guard("actors/state.py", "        self._restarts = 0\n        node.have", "        node.have", _STATE + "test_work_done_forgives_earlier_restarts"),
    Guard("actors/state.py", "        if self._unseen:\n            return False", "", _STATE + "test_nothing_is_read_before_every_node_has_said_what_it_holds"),
    Guard("actors/state.py", "again = again.without(held_anywhere(self._nodes.values()))", "pass", _STATE + "test_what_a_survey_finds_while_it_is_under_way_is_not_tried_again"),
    Guard("actors/state.py", "            self._waiting.skip(node.have)", "            pass", _STATE + "test_what_was_done_before_its_worker_died_is_found_by_the_survey"),
    Guard("actors/state.py", "if any(self._todo.lacking(node) for node in manned.values()):", "if False:", _STATE + "test_a_node_without_workers_is_waited_for_and_then_read_again"),
    Guard("actors/todo.py", "if slot in held or", "if", _STATE + "test_every_schedule_ends_whole"),
    Guard("actors/waiting.py", "if task.kind is not Kind.TRANSFER or self._crew_size(task.source):", "if True:", _STATE + "test_every_schedule_ends_whole"),
    Guard("actors/waiting.py", "if worker.ingests and task.failed_on != name:", "if worker.ingests:", _STATE + "test_a_failed_task_is_tried_by_somebody_else"),
    Guard("actors/state.py", "fence=tuple(self._fallen.get(worker.node, ()))", "fence=()", _STATE + "test_stale_and_repeated_answers_are_ignored"),
    Guard("actors/todo.py", "(slot in node.base and slot not in self._new)", "(slot in node.base)", _STATE + "test_every_schedule_ends_whole"),
    Guard("actors/todo.py", "slot[0] not in stale and", "", _STATE + "test_only_the_hole_of_a_last_generation_is_read_from_nothing"),
    Guard("actors/todo.py", " and count == count_with(goal.whole[slot])", "", _LOSSES + "test_every_schedule_with_corrupt_fragments_ends_with_the_rest"),
    Guard("actors/losses.py", "if unit is not None and fragment in unit.fragments:", "if False:", _LOSSES + "test_what_was_published_is_not_lost_afterwards"),
    Guard("actors/losses.py", "found[: max(published, self._announced)]", "found[:published]", _LOSSES + "test_what_was_published_is_not_lost_afterwards"),
    Guard("actors/losses.py", "        check_least(manifest, left, self._min_quality)\n", "", _LOSSES + "test_the_least_quality_ends_it_at_once"),
    Guard("actors/losses.py", "_mandatory(manifest) - set(missed)", "_mandatory(manifest)", _LOSSES + "test_what_is_mandatory_ends_it"),
    Guard("actors/goals.py", "if (slot[0], fragment.requires) in lost:", "if False:", _LOSSES + "test_every_schedule_with_corrupt_fragments_ends_with_the_rest"),
    Guard("actors/state.py", "self._has_ingesting(but=worker)", "False", _LOSSES + "test_another_worker_tries_before_anything_is_lost"),
    Guard("kernels/dealt.py", "self._scatter(slot, np.zeros(self._count(slot), np.float32))", "pass", _LOSSES + "test_of_what_was_begun_and_is_lost_nothing_stays"),
    Guard("actors/coordinator.py", "lost=legacy.lost,", "", "actors/test_warm_up.py::test_every_generation_is_what_a_load_that_skips_gives"),
    Guard("actors/warm_model.py", "if coordinator is not self._followed:", "if False:", "actors/test_warm_up.py::test_every_generation_is_what_a_load_that_skips_gives"),
    Guard("actors/roster.py", "self.base.issuperset(slots_of(task.units))", "bool(self.base)", _STATE + "test_refining_is_for_who_has_exactly_these_slots"),
    Guard("actors/state.py", "if len(worker.flying) <= depth and", "if", _STATE + "test_workers_pull_two_tasks_at_a_time"),
)  # fmt: skip

_COMBINE = "kernels/test_combine.py::"
_SHARDS = "actors/test_shards.py::"
_IN_PLACE = "actors/test_in_place.py::"
_DEVICE = "actors/test_device_memory.py::"

DEVICES: Final = (
    Guard("kernels/combine.py", "    if wrong.size:", "    if False:", _COMBINE + "test_a_part_with_no_holder_or_two_is_refused"),
    Guard("kernels/combine.py", "        device.clear(memory)\n", "", _COMBINE + "test_every_member_gets_every_part"),
    Guard("kernels/combine.py", "            if mine[index]:", "            if True:", _COMBINE + "test_every_member_gets_every_part"),
    Guard("kernels/host_communicator.py", "secrets.compare_digest(said, secret)", "True", _COMBINE + "test_strangers_do_not_join"),
    Guard("kernels/host_communicator.py", "if wire.take(_HEADER.size, patience) != header:", "if not wire.take(_HEADER.size, patience):", _COMBINE + "test_floats_and_mismatched_arrays_are_refused"),
    Guard("kernels/communicator.py", "if self.stop.is_set():", "if False:", _COMBINE + "test_who_waits_in_vain_gives_up"),
    Guard("kernels/communicator.py", "if np.dtype(array.dtype).name not in UNSIGNED or", "if", _COMBINE + "test_floats_and_mismatched_arrays_are_refused"),
    Guard("actors/device_worker.py", "if not all(memory.holds(slot)", "if False and not all(memory.holds(slot)", _DEVICE + "test_what_is_not_held_is_not_contributed"),
    Guard("actors/device_worker.py", "self._stop(reign, group).set()", "pass", _DEVICE + "test_an_abort_that_overtakes_its_task_ends_it"),
    Guard("actors/device_memory.py", "        accumulator.combine(before)\n", "", _DEVICE + "test_refining_generation_after_generation"),
    Guard("actors/device_memory.py", "        self.device.synchronize()", "        pass", _DEVICE + "test_a_worker_overlaps_and_waits_for_what_it_reports"),
    Guard("actors/device_memory.py", "            self._check_room(layout.nbytes)\n", "", _DEVICE + "test_a_second_generation_that_cannot_fit_is_refused_before_it_is_allocated"),
    Guard("actors/device_memory.py", "if found is None or not found.closed:", "if found is None:", _DEVICE + "test_a_device_of_a_shard_has_room_for_its_own_only"),
    Guard("actors/device_memory.py", "if not self._tensors <= shard.tensors:", "if False:", _DEVICE + "test_what_a_device_is_not_to_hold_any_more_is_not_passed_off_as_held"),
    Guard("actors/device_memory.py", "                published.marks = self._no_marks()", "                pass", _DEVICE + "test_what_a_device_is_not_to_hold_any_more_is_not_passed_off_as_held"),
    Guard("actors/in_place.py", "            self._last.marks.spoil(slot)", "            pass", _IN_PLACE + "test_what_began_to_be_refined_is_no_base_any_more"),
    Guard("actors/in_place.py", "        self._check_held((unit.tensor, unit.slot) for unit in work if first_layer(unit))\n", "", _IN_PLACE + "test_what_began_to_be_refined_is_no_base_any_more"),
    Guard("actors/in_place.py", "        self._check_held(slot for slot, count in slots.items() if count)\n", "", _IN_PLACE + "test_what_began_to_be_refined_is_no_base_any_more"),
    Guard("actors/in_place.py", "if generation + 1 in self._generations:", "if False:", _IN_PLACE + "test_nobody_is_given_weights_while_they_are_refined"),
    Guard("actors/in_place.py", "if last is not None and last.places.keys() <= self._tensors:", "if last is not None:", _IN_PLACE + "test_who_is_to_hold_less_takes_new_memory"),
    Guard("actors/state.py", "if self._in_place and task.kind is not Kind.CARRY:", "if False:", _SHARDS + "test_every_schedule_in_place_ends_whole"),
    Guard("actors/todo.py", "        if not task.refines:\n            yield from", "        if True:\n            yield from", _SHARDS + "test_every_schedule_in_place_ends_whole"),
    Guard("actors/placement.py", "if held.number > shard.number:", "if True:", "actors/test_placement.py::test_claims_are_settled_by_their_numbers_in_whatever_order_they_come"),
    Guard("actors/placement.py", "if seated and seated.tensors:", "if False:", "actors/test_placement.py::test_no_tensor_has_two_holders_and_all_find_one"),
    Guard("actors/device_memory.py", "return max((groups, *(self._turn_bytes[t] for t in self._tensors)))", "return max(self._turn_bytes)", _DEVICE + "test_frames_that_a_worker_opens_are_planned_for"),
    Guard("actors/device_memory.py", "for f in unit.fragments) if self.opens_frames else 0", "for f in unit.fragments) if False else 0", _DEVICE + "test_as_many_threads_open_frames_as_there_is_room_for"),
    Guard("actors/state.py", "self._shards.claim(task.node, found.shard)", "pass", _SHARDS + "test_of_two_who_were_told_the_same_the_later_one_holds_it"),
    Guard("actors/state.py", "if len(idle) < len(self._nodes) or not shards.are_all_held:", "if len(idle) < len(self._nodes):", _SHARDS + "test_a_shard_for_which_nobody_comes_is_spread"),
    Guard("actors/state.py", "if len(idle) < len(self._nodes) or not shards.are_all_held:", "if not shards.are_all_held:", _SHARDS + "test_every_schedule_of_shards_ends_whole"),
    Guard("actors/todo.py", "if node.shard != shard:", "if node.shard is None:", _SHARDS + "test_a_shard_for_which_nobody_comes_is_spread"),
    Guard("actors/device_worker.py", "if entry.codec not in registry.DEVICE_ACCUMULATORS:", "if False:", _DEVICE + "test_codecs_that_no_device_has_are_refused_first"),
    Guard("actors/state.py", "        if group.number in self._broken:\n            return", "", _STATE + "test_a_broken_group_is_told_and_slots_travel_one_by_one"),
    Guard("actors/state.py", "if worker in self._workers:  # some buckets", "if False:  # some buckets", _STATE + "test_a_broken_group_is_told_and_slots_travel_one_by_one"),
    Guard("actors/state.py", "                self._say(Abort(name, group.number))", "                pass", _STATE + "test_a_broken_group_is_told_and_slots_travel_one_by_one"),
    Guard("actors/state.py", "self._collective and not self._broken and", "self._collective and", _STATE + "test_a_broken_group_is_told_and_slots_travel_one_by_one"),
    Guard("actors/state.py", "self._now - since > self.policy.combine_timeout_s", "False", _STATE + "test_a_broken_group_is_told_and_slots_travel_one_by_one"),
    Guard("actors/state.py", "        if not isinstance(error, HolorayError):\n            self._give_up(error)", "", _STATE + "test_a_bug_in_combining_is_not_hidden"),
    Guard("actors/state.py", "return len(manned) >= self._expected if self.home is None else self.home in manned", "return True if self.home is None else self.home in manned", _STATE + "test_a_device_that_never_comes_ends_the_warm_up"),
)  # fmt: skip

SOURCES: Final = (
    Guard("stores/redirects.py", "here = scope(peer)", "here = min(map(scope, _addresses(*hop.origin[1:])))", _HTTP + "test_the_host_that_answers_is_the_one_that_counts"),
    Guard("stores/redirects.py", "if max(map(scope, addresses)) > here:", "if False:", _HTTP + "test_a_redirect_never_leads_closer"),
    Guard("stores/redirects.py", "ip = _within(ip_address(", "ip = (ip_address(", _HTTP + "test_who_can_reach_an_address"),
    Guard("pipelines/loader.py", "    check_mandatory(manifest, progress, \"", "    str(\"", _POOL + "test_a_mandatory_tensor_cannot_be_skipped"),
    Guard("pipelines/source_book.py", "if i not in avoid and not self.is_quarantined(source)]", "if i not in avoid]", _BOOK + "test_a_source_that_was_convicted_often_enough_is_never_asked_again"),
    Guard("pipelines/source_book.py", "if retry and not self._may_retry(now):", "if False:", _BOOK + "test_retries_have_a_budget_that_time_and_successes_fill"),
    Guard("pipelines/source_book.py", "first = min(self.sources[i].priority for i in steady)", "first = min(self.sources[i].priority for i in usable)", _BOOK + "test_who_owes_an_answer_is_not_waited_for_by_what_a_lower_priority_could_give"),
    Guard("pipelines/source_book.py", "            left = [i for i in left if not self._may_be_stalled(self.sources[i], now)] or left\n", "", _BOOK + "test_schedules"),
    Guard("pipelines/source_book.py", "            left = [i for i in left if self.sources[i].failures == fewest]\n", "", _BOOK + "test_who_never_answers_does_not_keep_a_range_from_those_of_a_lower_priority"),
    Guard("pipelines/source_book.py", "if not self.policy.hedge_share or self._hedged_bytes + attempt.nbytes > allowed:", "if not self.policy.hedge_share:", _BOOK + "test_hedges_wait_for_the_tail_and_keep_to_their_budget"),
    Guard("pipelines/source_book.py", "        if now < source.ready_at:\n            return False\n", "", _BOOK + "test_the_breaker_opens_and_lets_single_tries_through"),
    Guard("pipelines/source_book.py", "return not (careful and source.in_flight)", "return True", _BOOK + "test_a_source_of_unknown_speed_gets_one_small_request"),
    Guard("pipelines/source_book.py", "if not self._is_full(source) and self._has_room(source, wanted):", "if not self._is_full(source):", _BOOK + "test_schedules"),
    Guard("pipelines/source_book.py", "if not self._is_full(source) and self._has_room(source, wanted):", "if self._has_room(source, wanted):", _BOOK + "test_schedules"),
    Guard("pipelines/source_book.py", "beyond = self.policy.breaker_s * 2 **", "beyond = 0 *", _BOOK + "test_the_breaker_opens_and_lets_single_tries_through"),
    Guard("pipelines/span_request.py", "and self._is_nowhere(part.member)", "", "pipelines/test_source_policy.py::test_what_a_silent_source_may_have_is_not_corrupt"),
    Guard("pipelines/source_pool.py", "        out[: len(data)] = data\n", "", _POOL + "test_who_comes_late_changes_nothing"),
)  # fmt: skip

DEVICE_LOAD: Final = (
    Guard("pipelines/weights_memory.py", "with self.device.shared():", "if True:", _DEVICE_LOAD + "test_every_step_of_a_load_gives_the_bytes_of_the_host"),
    Guard("pipelines/weights_memory.py", "if nbytes + turn_bytes > self.limit_bytes:", "if False:", _DEVICE_LOAD + "test_a_budget_with_room_for_one_turn_is_kept"),
    Guard("pipelines/turns.py", "max(1, min(threads, room_bytes // turn_bytes)) if turn_bytes else threads", "threads", _DEVICE_LOAD + "test_as_many_threads_decode_as_there_is_room_for"),
    Guard("pipelines/weights_memory.py", "if sum(self._there.values()) + nbytes > self._room:", "if False:", _DEVICE_LOAD + "test_tensors_that_fit_one_by_one_are_not_there_together"),
    Guard("pipelines/weights_memory.py", "            check_device_codec(tensor.spec, codec)", "            pass", _DEVICE_LOAD + "test_what_a_device_cannot_do_is_told_before_anything_is_read"),
    Guard("pipelines/weights_memory.py", "group_nbytes(fragments) if self._opens_frames else 0", "0", _OPENED + "test_groups_keep_to_the_memory_that_was_planned"),
    Guard("pipelines/weights_memory.py", "if self._may_hold(need)]", "]", "cuda/test_codecs_on_a_device.py::test_a_tensor_whose_state_does_not_fit_goes_to_the_host_alone"),
    Guard("pipelines/frame_groups.py", " + member.nbytes > GROUP_BYTES", " < 0", _OPENED + "test_groups_keep_to_the_memory_that_was_planned"),
    Guard("pipelines/frame_groups.py", "            _name(group)", "            pass", _OPENED + "test_bad_frames_are_the_errors_of_the_host"),
    Guard("pipelines/frame_groups.py", "                self._device.synchronize()\n", "", _OPENED + "test_a_fragment_that_is_reported_is_there"),
    Guard("pipelines/frame_groups.py", "added.append(left.pop(0))", "added.append(member)", _OPENED + "test_a_group_without_memory_is_opened_again_and_what_was_told_is_there"),
    Guard("pipelines/frame_groups.py", "            and is_plain(member.payloads[0])\n", "", _OPENED + "test_frames_with_what_only_the_host_looks_at_stay_there"),
    Guard("kernels/frames.py", "return not found.has_checksum and", "return", _OPENED + "test_frames_with_what_only_the_host_looks_at_stay_there"),
    Guard("pipelines/turns.py", "error.with_traceback(None)", "error", "pipelines/test_turns.py::test_a_failed_attempt_holds_nothing_while_it_waits"),
    Guard("kernels/planes_decode.py", "self.waiting[slot] = waiting\n", "pass\n", _DEVICE_LOAD + "test_layers_that_wait_for_others_wait_on_without_memory"),
    Guard("kernels/planes_decode.py", "self._restore(weights, before)", "pass", _DEVICE_LOAD + "test_a_run_is_put_back_when_its_verdict_cannot_be_had"),
    Guard("kernels/copies.py", "after=stream.record()", "after=None", "cuda/test_copies.py::test_what_is_written_is_read_back"),
)  # fmt: skip

GUARDS: Final = (*INTEGRITY, *MANIFEST, *PAYLOADS, *WRITING, *QUANTISED, *STATE, *DEVICES, *DEVICE_LOAD, *SOURCES)
