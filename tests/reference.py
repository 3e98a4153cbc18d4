"""The oracle: labels enumerated, autograd twice, loops over parameters, float64. Slow, obvious."""

import torch


def derivatives(model, x):
    """J and S at one input x [1, ...]: parameter name → [T, *shape], by autograd twice."""
    J, S = {}, {}
    num_outputs = model(x).shape[1]
    for name, parameter in model.named_parameters():
        J[name] = torch.zeros(num_outputs, *parameter.shape, dtype=parameter.dtype)
        S[name] = torch.zeros_like(J[name])
        for a in range(num_outputs):
            (first,) = torch.autograd.grad(model(x)[0, a], parameter, create_graph=True)
            J[name][a] = first.detach()
            for i in range(parameter.numel()):
                if first.requires_grad:
                    (row,) = torch.autograd.grad(
                        first.flatten()[i], parameter, retain_graph=True, materialize_grads=True
                    )
                    S[name][a].view(-1)[i] = row.flatten()[i]
    return J, S


def categorical(model, x):
    """I, V₁, V₂, C₁₂ of one label at x, by enumerating labels and differentiating log p."""
    sigma = torch.softmax(model(x)[0].detach(), dim=0)
    result = {q: {} for q in ("I", "v1", "v2", "c12")}
    for name, parameter in model.named_parameters():
        i1, i2 = [], []  # Î₁ and Î₂ on the single label y, for every y
        for y in range(len(sigma)):
            log_p = torch.log_softmax(model(x)[0], dim=0)[y]
            (first,) = torch.autograd.grad(log_p, parameter, create_graph=True)
            second = torch.zeros(parameter.numel(), dtype=parameter.dtype)
            for i in range(parameter.numel()):
                (row,) = torch.autograd.grad(first.flatten()[i], parameter, retain_graph=True)
                second[i] = row.flatten()[i]
            i1.append(first.detach() ** 2)
            i2.append(-second.view_as(parameter))
        mean1 = sum(p * e for p, e in zip(sigma, i1, strict=True))
        mean2 = sum(p * e for p, e in zip(sigma, i2, strict=True))
        assert torch.allclose(mean1, mean2, rtol=1e-9, atol=1e-14)  # (*) of Eq. 2
        result["I"][name] = mean1
        result["v1"][name] = sum(p * (e - mean1) ** 2 for p, e in zip(sigma, i1, strict=True))
        result["v2"][name] = sum(p * (e - mean1) ** 2 for p, e in zip(sigma, i2, strict=True))
        result["c12"][name] = sum(
            p * (a - mean1) * (b - mean1) for p, a, b in zip(sigma, i1, i2, strict=True)
        )
    return result


def moments(sigma):
    """𝓘 and 𝓚 of a one-hot label with probabilities sigma [C], by loops over the labels."""
    num_classes = len(sigma)
    cov = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    fourth = torch.zeros(*[num_classes] * 4, dtype=torch.float64)
    for y in range(num_classes):
        delta = -sigma.clone()
        delta[y] += 1
        cov += sigma[y] * torch.outer(delta, delta)
        fourth += sigma[y] * torch.einsum("a,b,c,d->abcd", delta, delta, delta, delta)
    return cov, fourth
