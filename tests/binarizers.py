"""Ways in which people make bits of a weight, each a function of one tensor."""

import torch

WIDTH = 20


def ste(w):
    return w + (torch.where(w >= 0, 1.0, -1.0) - w).detach()


def centred(w):
    return ste(w - w.mean(1, keepdim=True))


def scaled_rows(w):
    return ste(w) * w.abs().mean(1, keepdim=True).detach()


def scaled_columns(w):
    return ste(w) * w.abs().mean(0, keepdim=True).detach()


def clipped(w):
    """Passes the gradient of a clipped copy, as Bi-Real-net does."""
    out, clip = w.sign() * w.abs().mean(1, keepdim=True), w.clamp(-1, 1)
    return out.detach() - clip.detach() + clip


def clip_mask(w):
    """Passes the gradient where a float mask, which is made of the weight too, is 1."""
    mask = (w.abs() <= 1).float()
    return w.sign().detach() * (1 - mask) + (w * mask + (w.sign() - w * mask).detach()) * mask


def set_in_a_copy(w):
    b = w.clone()
    b[w >= 0] = 1
    b[w < 0] = -1
    return b


def set_in_itself(w):
    b = w.detach().clone()
    b[b >= 0] = 1
    b[b < 0] = -1
    return b


def in_place(w):
    return w.detach().clone().sign_()


def in_a_given_one(w):
    b = torch.zeros_like(w)
    torch.where(w.detach() >= 0, torch.ones(()), -torch.ones(()), out=b)
    return b


def copied_into(w):
    b = torch.zeros(w.shape)
    b.copy_(w.sign())
    return b


def filled(w):
    return torch.ones_like(w).masked_fill(w < 0, -1.0)


def compared(w):
    return (w > 0).float() * 2 - 1


def zero_or_one(w):
    return (w > 0).to(w.dtype)


def zero_or_one_function(w):
    return torch.heaviside(w.detach(), torch.ones(()))


def random_of_its_shape(w):
    return torch.where(torch.rand(w.shape) < torch.sigmoid(w), 1.0, -1.0)


def random_like_it(w):
    return torch.where(torch.rand_like(w) < torch.sigmoid(w), 1.0, -1.0)


def drawn(w):
    return torch.bernoulli(torch.sigmoid(w)) * 2 - 1


def drawn_in_place(w):
    return torch.zeros_like(w).bernoulli_(torch.sigmoid(w).detach()).mul_(2).sub_(1)


def noisy(w):
    return ste(w + torch.zeros_like(w).normal_())


def in_float64(w):
    return w.double().sign().float()


def in_bfloat16(w):
    return ste(w.bfloat16()).float()


def other_order(w):
    return ste(w.t()).t()


def without_graph(w):
    return w.data.sign()


def by_division(w):
    return w / w.abs()


def hard_tanh(w):
    return torch.nn.functional.hardtanh(w * 1e30)


SYMMETRIC = [ste, centred, scaled_rows, scaled_columns, clipped, clip_mask, set_in_a_copy, set_in_itself, in_place]
SYMMETRIC += [in_a_given_one, copied_into, filled, compared, random_of_its_shape, random_like_it, drawn, drawn_in_place]
SYMMETRIC += [noisy, in_float64, in_bfloat16, other_order, without_graph, by_division, hard_tanh]
ASYMMETRIC = [zero_or_one, zero_or_one_function]
