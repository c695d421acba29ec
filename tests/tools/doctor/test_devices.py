"""doctor: the device. A GPU is a stand-in here; the CPU, nvcc's text and DeepSpeed are real."""

from __future__ import annotations

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from internvl_ds.tools.doctor import devices
from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING


class Gpu:
    """What describe() asks of an accelerator."""

    def __init__(self, name='cuda', count=2):
        self.name, self.count = name, count

    def device_name(self):
        return self.name

    def device_count(self):
        return self.count

    def is_bf16_supported(self):
        return True

    def is_fp16_supported(self):
        return True


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """GPUs with so much free memory each, and an nvcc of a version; None for one that is broken."""

    def have(*free, nvcc='13.0'):
        def mem_get_info(index):
            if free[index] is None:
                raise RuntimeError('CUDA error: uncorrectable ECC error encountered\nmore')
            return free[index], 80 * 10**9

        monkeypatch.setattr(torch.cuda, 'mem_get_info', mem_get_info)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'NVIDIA H100')
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
        home = tmp_path / 'cuda'
        (home / 'bin').mkdir(parents=True)
        if nvcc:
            text = f'Cuda compilation tools, release {nvcc}, V{nvcc}.1'
            (home / 'bin' / 'nvcc').write_text(f'#!/bin/sh\necho "{text}"\n')
            (home / 'bin' / 'nvcc').chmod(0o755)
        monkeypatch.setattr('torch.utils.cpp_extension.CUDA_HOME', str(home))
        return devices.describe(Gpu(count=len(free)))

    return have


def test_this_cpu(monkeypatch):
    monkeypatch.setattr(devices, 'has_gpu', lambda: False)
    accelerator, precisions = devices.describe(CPU_Accelerator())
    assert accelerator.verdict == OK
    assert 'bf16' in precisions.found
    fp16 = CPU_Accelerator().is_fp16_supported()
    assert (precisions.verdict == WARNING) == ('is refused' in precisions.advice) == (not fp16)


def test_a_gpu_that_torch_does_not_see_bites_unless_it_is_meant(monkeypatch):
    monkeypatch.setattr(devices, 'has_gpu', lambda: True)
    for name in ('DS_ACCELERATOR', 'CUDA_VISIBLE_DEVICES'):
        monkeypatch.delenv(name, raising=False)
    finding = devices.describe(CPU_Accelerator())[0]
    assert finding.verdict == ERROR
    assert 'train on the CPU without a word' in finding.advice
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    finding = devices.describe(CPU_Accelerator())[0]
    assert (finding.verdict, "CUDA_VISIBLE_DEVICES=''" in finding.found) == (WARNING, True)


def test_free_gpus(gpus):
    found = gpus(79 * 10**9, 79 * 10**9)
    assert [finding.verdict for finding in found] == [OK, OK, OK]
    assert found[0].found == 'cuda, 2 x NVIDIA H100 of 80 GB'
    assert found[2].found == 'CUDA 13.0; torch has CUDA 13.0'


def test_a_gpu_that_others_use_is_a_note(gpus):
    finding = gpus(79 * 10**9, 5 * 10**9)[0]
    assert (finding.verdict, 'partly taken: 1 (5 GB free)' in finding.found) == (WARNING, True)


def test_a_broken_gpu_bites(gpus):
    finding = gpus(79 * 10**9, None)[0]
    assert finding.verdict == ERROR
    assert finding.found == 'cuda:1 of 2: CUDA error: uncorrectable ECC error encountered'


def test_an_nvcc_of_another_cuda_bites_as_deepspeed_would_have_it(gpus):
    finding = gpus(79 * 10**9, nvcc='12.8')[2]
    assert (finding.verdict, finding.found) == (ERROR, 'CUDA 12.8; torch has CUDA 13.0')
    assert 'torch.optim.AdamW needs none' in finding.advice


def test_no_nvcc_is_a_note(gpus):
    finding = gpus(79 * 10**9, nvcc=None)[2]
    assert (finding.verdict, finding.found) == (WARNING, 'none; torch has CUDA 13.0')


def test_another_device_is_a_note(monkeypatch):
    finding = devices.describe(Gpu('xpu', 4))[0]
    assert (finding.verdict, finding.found) == (WARNING, 'xpu, 4 devices')


@pytest.mark.parametrize('native', [True, False])
def test_bf16_that_is_emulated_is_a_note(gpus, monkeypatch, native):
    """As on a V100 or T4, of which torch says that they know it."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: native)
    finding = gpus(79 * 10**9)[1]
    verdict = OK if native else WARNING
    assert (finding.verdict, 'by emulation' in finding.found) == (verdict, not native)
