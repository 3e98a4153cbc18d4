"""The oracle: labels enumerated, autograd twice, loops over parameters, float64. Slow, obvious."""

import numpy as np
import torch

from fimlib.families import Bernoulli, GaussianHead, Poisson


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


def bernoulli(h):
    """All 2^T labels at logits h [T], their probabilities and t(y)."""
    y = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(h))
    y = y.reshape(-1, len(h))
    p = torch.sigmoid(h)
    return y, (y * p + (1 - y) * (1 - p)).prod(1), y


def poisson(h):
    """Counts up to where less than 1e-13 of the mass is left, at log rates h [T]."""
    counts = torch.arange(45, dtype=torch.float64)
    y = torch.cartesian_prod(*[counts] * len(h)).reshape(-1, len(h))
    p = (y * h - h.exp() - torch.lgamma(y + 1)).sum(1).exp()
    assert 1 - p.sum() < 1e-13
    return y, p, y


def hermite(num_labels):
    """Nodes and weights that integrate polynomials of degree < 16 over a standard normal."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(8))
    noise = torch.cartesian_prod(*[nodes] * num_labels).reshape(-1, num_labels)
    p = torch.cartesian_prod(*[weights / weights.sum()] * num_labels).reshape(-1, num_labels)
    return noise, p.prod(1)


def gaussian(covariance):
    """Quadrature for y ~ N(h, Σ), with t(y) = Σ⁻¹y."""

    def labels(h):
        noise, p = hermite(len(h))
        y = h + noise @ torch.linalg.cholesky(covariance).T
        return y, p, y @ labels.precision

    labels.precision = torch.linalg.inv(covariance)
    return labels


def gaussian_head(h):
    """Quadrature for y_k ~ N(μ_k, s_k²) at h = (μ, log s), with t = (ε, ε² − 1)."""
    mu, rho = h.chunk(2)
    noise, p = hermite(len(mu))
    return mu + rho.exp() * noise, p, torch.cat([noise, noise**2 - 1], dim=1)


def log_density(family, h, y, precision):
    """log p(y|h) of one label up to a constant; ``precision`` is that of a plain Gaussian."""
    if isinstance(family, Bernoulli):
        return torch.distributions.Bernoulli(logits=h, validate_args=False).log_prob(y).sum()
    if isinstance(family, Poisson):
        return torch.distributions.Poisson(h.exp(), validate_args=False).log_prob(y).sum()
    if isinstance(family, GaussianHead):
        mu, rho = h.chunk(2)
        return torch.distributions.Normal(mu, rho.exp(), validate_args=False).log_prob(y).sum()
    return -(y - h) @ precision @ (y - h) / 2


def by_quadrature(net, x, family, labels):
    """Scores and Hessians of log p at one input, by autograd, and what their moments say.

    Returns a dict: y, p, the score [A, P] and minus_hessian [A, P, P] of every label, and I, v1, v2
    and c12 of the diagonal estimators, [P] in the order of ``net.named_parameters()``.
    """
    names = [name for name, _ in net.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    y, p, _ = labels(net(x)[0].detach())
    precision = getattr(labels, "precision", None)

    def minus_log_p(flat, y):
        pieces = flat.split([parameter.numel() for parameter in net.parameters()])
        shapes = [parameter.shape for parameter in net.parameters()]
        values = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        h = torch.func.functional_call(net, values, (x,))[0]
        return -log_density(family, h, y, precision)

    score = torch.func.vmap(torch.func.grad(minus_log_p), in_dims=(None, 0))(flat, y)
    hessian = torch.func.vmap(torch.func.hessian(minus_log_p), in_dims=(None, 0))(flat, y)
    i1, i2 = score**2, hessian.diagonal(dim1=1, dim2=2)
    I = p @ i1
    moments = {"I": I, "v1": p @ (i1 - I) ** 2, "v2": p @ (i2 - I) ** 2}
    moments["c12"] = p @ ((i1 - I) * (i2 - I))
    return {"y": y, "p": p, "score": score, "minus_hessian": hessian, **moments}
