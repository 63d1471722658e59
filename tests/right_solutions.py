"""Another right solution of each exercise, for test_exercises.py: other formulas, numpy where no
gradient matters, keyword arguments, loops, helpers and imports of the student's own (above the line
"# ---") and work in place on tensors that no one else holds."""
RIGHT = {
    "schedule": '''
import numpy as np
# ---
def schedule(self, K):
    if K < 1 or K > self.T:
        raise UserError("no")
    t = np.round(self.T * np.arange(K, -1, -1) / K).astype(int) - 1
    return [(int(a), int(b)) for a, b in zip(t, t[1:])]
''', "q_sample": '''
def q_sample(self, x0, t, z):
    a = self.abar[t].reshape(len(t), *[1] * (x0.dim() - 1)).to(x0)
    out = x0.clone()
    out.mul_(torch.sqrt(a)).add_(z * torch.sqrt(1 - a))
    return out
''', "v_loss": '''
def loss(self, net, lq, gt, generator):
    z = torch.empty_like(gt).normal_(generator=generator)
    t = (torch.rand(gt.shape[0], generator=generator) * self.T).long()
    x = self.q_sample(x0=gt, t=t, z=z)
    a = self.abar_at(t, like=gt)
    v = (z - (1 - a).sqrt() * x) / a.sqrt()
    out = self.predict(net=net, x=x, lq=lq, t=t)
    return F.mse_loss(out, v, reduction="none").flatten(1).mean(1)
''', "sigma": '''
def sigma(self, t, s, eta):
    if s < 0:
        return torch.zeros((), dtype=torch.float64)
    a, b = self.levels(t=t, s=s)
    beta = 1 - a / b
    return torch.sqrt(eta ** 2 * beta * (1 - b) / (1 - a))
''', "ddim_mean": '''
def ddim_mean(self, x0, eps, t, s, eta):
    a_s = self.levels(t, s)[1]
    rest = torch.relu(1 - a_s - self.sigma(t=t, s=s, eta=eta).square())
    out = x0 * torch.sqrt(a_s)
    out += eps * torch.sqrt(rest)
    return out
''', "ddim_step": '''
def ddim_step(self, net, x, lq, t, s, eta):
    B = x.shape[0]
    ts = t * torch.ones(B, dtype=torch.int64)
    v = self.predict(net=net, x=x, lq=lq, t=ts)
    a = self.abar[t].to(x.dtype)
    x0_hat = a.sqrt() * x - (1 - a).sqrt() * v
    eps = (x - a.sqrt() * x0_hat) / (1 - a).sqrt()
    return [self.ddim_mean(x0=x0_hat, eps=eps, t=t, s=s, eta=eta),
            self.sigma(t=t, s=s, eta=eta), x0_hat]
''', "sample": '''
def sample(self, net, lq, K, eta, generator):
    with torch.inference_mode(False), torch.no_grad():
        x = torch.randn(lq.shape, generator=generator, dtype=lq.dtype)
        for t, s in self.schedule(K=K):
            mu, sigma, _ = self.ddim_step(net=net, x=x, lq=lq, t=t, s=s, eta=eta)
            x = mu
            if s != -1:
                x += sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x.clip(-1, 1)
''', "gaussian_log_prob": '''
from torch.distributions import Normal
# ---
def gaussian_log_prob(x, mu, sigma, g=1):
    each = Normal(mu.float(), sigma.float()).log_prob(x.float()).mean(1)
    lines = torch.stack([u.mean(1) for u in each.chunk(g, dim=1)], 1)
    return torch.stack([u.mean(2) for u in lines.chunk(g, dim=2)], 2)
''', "group_advantages": '''
import numpy as np
# ---
def group_advantages(rewards, std="group"):
    r = rewards.numpy().astype(np.float64)
    within = np.sqrt(r.var(1, keepdims=True).mean((2, 3), keepdims=True))
    divisor = within if std == "group" else np.sqrt(r.var((0, 1)).mean())
    A = np.where(within < MIN_STD, 0, (r - r.mean(1, keepdims=True)) / (divisor + ADV_EPS))
    return torch.from_numpy(A).to(rewards.dtype)
''', "noise_level_weights": '''
def noise_level_weights(sigma):
    return len(sigma) * sigma / sum(sigma)
''', "clipped_loss": '''
def clipped_loss(log_prob, old, advantage, clip):
    r = log_prob.exp() / old.exp()
    high = torch.minimum(r, torch.full_like(r, 1 + clip))
    low = torch.maximum(r, torch.full_like(r, 1 - clip))
    objective = torch.where(advantage > 0, advantage * high, advantage * low)
    return -objective, r.detach()
''', "gt_likelihood_loss": '''
def gt_likelihood_loss(log_prob):
    return -torch.expm1(-F.relu(-log_prob) / GT_TEMPERATURE)
'''.replace("F.relu(", "torch.relu("), "rollout": '''
def rollout(self, lq):
    every = torch.cat([row.expand(self.settings.group, -1, -1, -1) for row in lq])
    x, done = torch.randn((lq if self.shared > 0 else every).shape, generator=self.generator,
                          dtype=lq.dtype), []
    for k, (t, s) in enumerate(self.schedule):
        mu, sigma, x0_hat = (u.detach() for u in self.policy(x=x, lq=lq, t=t, s=s))
        if s < 0:
            return mu, done
        if own := k >= self.shared:
            mu = repeat_to(u=mu, n=len(every))
        noise = torch.randn(mu.shape, generator=self.generator, dtype=lq.dtype)
        action = torch.addcmul(mu, noise, sigma.to(mu.dtype))
        if own:
            log_prob = gaussian_log_prob(x=action, mu=mu, sigma=sigma, g=self.g)
            done += [Transition(t=t, s=s, x=x, action=action, x0_hat=x0_hat, log_prob=log_prob)]
        x = action
''', "noised_log_prob": '''
def noised_log_prob(self, step, gt, mu, sigma):
    if step.x_gt is None:
        z = torch.randn(gt.shape, generator=self.generator, dtype=gt.dtype)
        step.x_gt = self.diffusion.q_sample(x0=gt, t=torch.tensor([step.s] * len(gt)), z=z)
    return gaussian_log_prob(x=step.x_gt, mu=mu, sigma=sigma)[:, 0, 0]
''', "posterior_log_prob": '''
def posterior_log_prob(self, step, gt, mu, sigma):
    x = step.x.repeat_interleave(len(gt) // len(step.x), 0)
    other = self.diffusion.posterior_mean(x0=gt, x=x, s=step.s, t=step.t, eta=self.settings.eta)
    return ((other - mu) / sigma).square().flatten(1).mean(1) / -2
''', "gaussian_kl": '''
def gaussian_kl(mu, ref, sigma):
    d = (mu - ref).flatten(1)
    return (d * d).sum(1) / (2 * sigma ** 2 * d.shape[1])
''', "ssim_map": '''
def window(like):
    g = torch.tensor([math.exp(-(i - 5) ** 2 / 4.5) for i in range(11)], dtype=like.dtype)
    g = torch.outer(g, g)
    return (g / g.sum()).expand(like.shape[1], 1, 11, 11)
# ---
def ssim_map(x, y):
    x, y = x / 2 + .5, y / 2 + .5
    w, C = window(x), x.shape[1]
    mx, my = F.conv2d(x, w, groups=C), F.conv2d(y, w, groups=C)
    vx = F.conv2d((x * x), w, groups=C) - mx ** 2
    vy = F.conv2d((y * y), w, groups=C) - my ** 2
    cov = (F.conv2d((x + y) ** 2, w, groups=C) - (mx + my) ** 2 - vx - vy) / 2
    light = (2 * mx * my + SSIM_C1) / (mx ** 2 + my ** 2 + SSIM_C1)
    return (light * (2 * cov + SSIM_C2) / (vx + vy + SSIM_C2)).mean(1)
''', "low_pass": '''
def low_pass(x):
    w = torch.full((x.shape[1], 1, 8, 8), 1 / 64, dtype=x.dtype)
    return F.conv2d(x, w, stride=4, groups=x.shape[1])
''', "dwt": '''
def dwt(x, y):
    bands = [low_pass(x=(u + 1) / 2) for u in (x, y)]
    l1 = F.l1_loss(*bands, reduction="none").flatten(1).mean(1)
    return (-LOW_PASS_SHARPNESS * l1).exp()
''', "pair_loss": '''
def pair_loss(better, worse):
    return -F.logsigmoid(better - worse).mean()
''', "roll": '''
def roll(self, lq, k):
    def z():
        return torch.randn(lq.shape, generator=self.generator, dtype=lq.dtype)
    x = z()
    with torch.no_grad():
        for i in range(k):
            t, s = self.schedule[i]
            eta = self.settings.eta
            if type(eta) is str:
                eta = float(torch.rand(1, generator=self.generator))
            mu, sigma, _ = self.diffusion.ddim_step(net=self.net, x=x, lq=lq, t=t, s=s, eta=eta)
            x = mu.add_(sigma * z())
    return x
''', "refl_losses": '''
def losses(self, x, lq, gt, k):
    t, s = self.schedule[k]
    def step(net):
        with block_outputs(net) as kept:
            out = self.diffusion.ddim_step(net=net, x=x, lq=lq, t=t, s=s, eta=0)[2]
        return out, kept
    x0_hat, mine = step(self.net)
    _, terms = self.reward(x=x0_hat, gt=gt)
    weights = self.reward.weights
    out = {"reward": sum(w * (1 - terms[name].mean()) for name, w in weights.items())}
    if self.settings.struct_weight > 0:
        out["struct"] = structure_loss(x=x0_hat, gt=gt)
    if self.settings.reg_weight > 0:
        with torch.no_grad():
            _, theirs = step(self.fidelity.reference)
        out["reg"] = feature_distance(mine, theirs)
    if self.settings.fidelity_weight > 0:
        out["fidelity"] = ((x0_hat - gt) ** 2).flatten(1).mean(1).mean()
    return out, x0_hat, terms
''', "update_frm": '''
def update_frm(self, restored, lq, gt):
    for p in self.frm.trained():
        p.requires_grad = True
        p.grad = None
    photo, worse, worst = self.frm.score(torch.cat([gt, restored, lq])).chunk(3)
    loss = .5 * pair_loss(better=photo, worse=worse) + .5 * pair_loss(better=photo, worse=worst)
    loss.backward()
    optimiser_step(self.frm_optimizer)
    for p in self.frm.trained():
        p.requires_grad = False
    return dict(frm_loss=loss.detach(), frm_accuracy=torch.mean((photo > worse).float()))
''', "blend_weight": '''
import numpy as np
# ---
def blend_weight(rho, blend):
    r = rho.numpy()
    if blend == "adaptive":
        share = 1 - 1 / (1 + r)
    elif blend == "hard":
        share = np.where(r > 1, 1., 0.)
    elif blend == "easy":
        share = np.where(r > 1, 0., 1.)
    else:
        share = np.full(len(r), float(blend))
    return torch.from_numpy(share).to(rho.dtype)
'''}
