"""FLOPs of a step against a count by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from proteus.data.loader import Batch
from proteus.models import create_model
from proteus.models.attention import use_attention
from proteus.models.heads import build_head
from proteus.training.flops import count_flops, training_flops
from proteus.training.sizes import Sizes
from proteus.training.task import Adaptor, Distillation
from proteus.training.teacher import Teacher

B, M, SIZE, PATCH, DEPTH, HEADS, CLASSES = 3, 2, 16, 4, 2, 2, 5
N = (SIZE // PATCH) ** 2
STUDENT, TEACHER = 16, 24  # widths


def encoder_of(width, **arch):
    sizes = {"patch_size": PATCH, "embed_dim": width, "depth": DEPTH, "num_heads": HEADS}
    return create_model("timm/vit_tiny_patch16_224", image_size=SIZE, **sizes, **arch)


def product(rows, inputs, outputs):
    """FLOPs of [rows, inputs] @ [inputs, outputs]: a multiplication and an addition each."""
    return 2 * rows * inputs * outputs


def embedding(width):
    return product(N, 3 * PATCH**2, width)


def blocks(width):
    tokens = N + 1
    linear = product(tokens, width, 3 * width) + product(tokens, width, width) + 2 * product(tokens, width, 4 * width)
    attention = HEADS * 2 * product(tokens, width // HEADS, tokens)  # scores, and their product with the values
    return DEPTH * (linear + attention)


def test_a_network_s_forward_and_backward_by_hand():
    encoder, images = encoder_of(STUDENT), torch.rand(B, 3, SIZE, SIZE)
    forward = B * (embedding(STUDENT) + blocks(STUDENT))
    with torch.no_grad():
        assert count_flops(lambda: encoder(images)) == forward
    # Two more of each, for what goes on to the layer before and for the weights; before the embedding there is none.
    trained = B * (2 * embedding(STUDENT) + 3 * blocks(STUDENT))
    assert count_flops(lambda: encoder(images).cls.sum().backward()) == trained
    encoder.network.patch_embed.requires_grad_(False)
    encoder.network.pos_embed.requires_grad_(False)
    encoder.network.cls_token.requires_grad_(False)
    # Before the first block's qkv nothing wants a gradient now.
    spared = B * (embedding(STUDENT) + product(N + 1, STUDENT, 3 * STUDENT))
    encoder.network.blocks[0].norm1.requires_grad_(False)
    encoder.mask_token.requires_grad_(False)
    assert count_flops(lambda: encoder(images).cls.sum().backward()) == trained - spared


def scene(losses, label_ce=0.0, masked=0, **options):
    """(task, its teacher, a batch)."""
    torch.manual_seed(0)
    student, grid = encoder_of(STUDENT, drop_path=0.3), (SIZE // PATCH, SIZE // PATCH)
    use_attention(student.network, "auto")
    adaptor = Adaptor(STUDENT, TEACHER, losses, grid, masked_per_process=masked, **options)
    classifier = build_head(STUDENT, CLASSES, "class") if label_ce else None
    sizes = Sizes(SIZE, SIZE, grid, [grid], [grid], grid)
    task = Distillation(student, {"teacher": adaptor}, sizes, label_ce, classifier).train()
    teacher = encoder_of(TEACHER)
    use_attention(teacher.network, "auto")
    teachers = [Teacher(teacher, None, [], Accelerator(cpu=True), "float32", SIZE, "teacher")]
    mask = torch.arange(N).repeat(masked, 1) % 2 == 0
    batch = Batch(torch.rand(B, 3, SIZE, SIZE), mask, torch.arange(B) % CLASSES, [], [])
    return task, teachers, batch


def flops_of(task, teachers, batch):
    return sum(training_flops([task], teachers, batch))


TEACHES = B * (embedding(TEACHER) + blocks(TEACHER))  # the teacher's forward


def learns(images, masked=0):
    return 2 * images * embedding(STUDENT) + 3 * (images + masked) * blocks(STUDENT)


def test_a_step_by_hand():
    step = scene({"token": 1.0})
    assert flops_of(*step) == TEACHES + learns(B) + 3 * product(B, STUDENT, TEACHER)


def test_what_the_teacher_costs_is_told_apart_and_counts_once_for_several_students():
    task, teachers, batch = scene({"token": 1.0})
    alone = training_flops([task], teachers, batch)
    assert alone.teachers == TEACHES
    assert training_flops([task, task], teachers, batch) == (TEACHES, 2 * alone.students)


def test_a_step_with_labels_by_hand():
    step = scene({"token": 1.0}, label_ce=1.0)
    heads = 3 * product(B, STUDENT, TEACHER) + 3 * product(B, STUDENT, CLASSES)
    assert flops_of(*step) == TEACHES + learns(B) + heads


def test_a_step_with_masked_images_by_hand():
    step = scene({"patch": 1.0}, masked=M)
    assert flops_of(*step) == TEACHES + learns(B, M) + 3 * product(M * N, STUDENT, TEACHER)


def test_a_step_of_a_frozen_student_by_hand():
    task, teachers, batch = scene({"token": 1.0})
    task.student.freeze()
    head = 3 * product(B, STUDENT, TEACHER)  # the gradient of its input too, for the norm before it
    forward = B * (embedding(STUDENT) + blocks(STUDENT))
    assert flops_of(task, teachers, batch) == TEACHES + forward + head


def test_counting_leaves_everything_as_it_was():
    task, teachers, batch = scene({"token": 1.0, "feature": 1.0, "patch": 1.0}, 1.0, M, standardize=True)
    answers = [teacher.answer(batch) for teacher in teachers]
    for _ in range(2):  # some way into a run
        sum(task(batch.images, batch.mask, answers, batch.labels).values()).backward()
    state = copy.deepcopy(task.state_dict())
    gradients = {name: parameter.grad.clone() for name, parameter in task.named_parameters()}
    random = torch.get_rng_state()
    first = flops_of(task, teachers, batch)
    assert first == flops_of(task, teachers, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert state["adaptors.0.standardizers.cls.count"] == 2 * B
    for key, value in task.state_dict().items():
        assert torch.equal(value, state[key]), key
    for name, parameter in task.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    assert task.training
    assert not teachers[0].encoder.training
    for encoder in (task.student, teachers[0].encoder):
        assert [block.attn.attention for block in encoder.network.blocks] == ["auto"] * DEPTH


def test_attention_is_torch_s_while_it_is_counted():
    task, teachers, batch = scene({"token": 1.0})
    seen = []
    for encoder in (task.student, teachers[0].encoder):
        encoder.network.blocks[0].attn.register_forward_pre_hook(lambda module, _: seen.append(module.attention))
    flops_of(task, teachers, batch)
    assert seen == ["sdpa", "sdpa"]  # xformers' kernels would count as nothing


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_grouped_convolution_by_hand(transposed, groups):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 16, 3, stride=2, padding=1, groups=groups)
    places = 10 * 10 if transposed else 5 * 5  # where the kernel is laid
    forward = B * places * product(3 * 3, 8 // groups, 16)
    images = torch.rand(B, 8, 10, 10)
    assert count_flops(lambda: layer(images)) == forward
    assert count_flops(lambda: layer(images).sum().backward()) == 2 * forward
    assert count_flops(lambda: layer(images.requires_grad_()).sum().backward()) == 3 * forward


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_attention_costs_the_same_whatever_the_kernel(kernel):
    q = torch.rand(B, 2, 5, 8, requires_grad=True)
    k, v = torch.rand(B, 2, 7, 8, requires_grad=True), torch.rand(B, 2, 7, 8, requires_grad=True)
    with sdpa_kernel(kernel):
        found = count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert found == 3 * B * 2 * 2 * product(5, 8, 7)
