"""The exercises of the course: what each asks, teaches and hints, and an experiment to run with it.

Their code stands in the files themselves (`place`), their checks in tests/checks_SET.py, the
answers to the experiments in docs/instructor.md. `python -m course` has the commands. What every
check of an exercise looks at besides its values (`gradient`, `random`, `results`, `float64`) is
declared here, and looked at by `Call` in tests/exercise_checks.py.
"""
from dataclasses import dataclass


@dataclass
class Exercise:
    """One exercise: the body of one function."""
    name: str           # on the command line; its check is check_NAME
    set: str            # diffusion, policy or rewards
    place: str          # module.function or module.Class.function
    minutes: int        # our estimate for a student who knows PyTorch
    teaches: str
    task: str           # one sentence
    hints: tuple        # two, from vague to nearly there
    experiment: str     # a command for the finished code
    question: str       # what to look at in its result
    gradient: tuple = ()        # the arguments that need a gradient; "net" is the network's output
    random: bool = False        # whether it draws from the caller's generator
    results: int = 1            # how many things it returns
    float64: bool = False       # whether it returns a scalar sigma, which is float64 by contract

    @property
    def file(self) -> str:
        """The file that the function stands in."""
        return self.place.split(".")[0] + ".py"

    @property
    def points(self) -> int:
        """One for each five minutes."""
        return self.minutes // 5


LRPO = "python train.py --mode lrpo"
REFL = "python train.py --mode refl --ddim_steps 10"
FULL = "--branch off --batch_size 8 --lr 1e-4"

EXERCISES = [
    # ------------------------------------------------------------------------- diffusion
    Exercise("schedule", "diffusion", "model.Diffusion.schedule", 10,
             "how a few steps cover all noise levels", "List the K sampling steps (t, s).",
             ("Write down the list for T = 10 and K = 2 by hand: where does it begin and end?",
              "Make the K values of t first; the values of s are the same list, one place on."),
             "python evaluate.py --ckpt runs/sft/last.pt --ddim_steps 10",
             "Compare K = 5 with K = 10: which metric gains, which loses?"),
    Exercise("q_sample", "diffusion", "model.Diffusion.q_sample", 10,
             "the forward process", "Add noise to a clean image, up to the level t.",
             ("abar is a variance: which power of it multiplies an image?",
              "`abar_at` gives abar_t in a shape that broadcasts over the images of a batch."),
             "python evaluate.py --ckpt runs/sft/last.pt",
             "By how much is the restorer nearer to the photo than its input, the row LQ?"),
    Exercise("v_loss", "diffusion", "model.Diffusion.loss", 20,
             "v-prediction and the supervised loss", "Return the supervised loss of each image.",
             ("Draw t, draw the noise, make the target v, predict it from x_t: four lines.",
              "Draw t with torch.randint and the generator, one t for each image, and average over "
              "all dimensions but the first."),
             "python evaluate.py --ckpt runs/sft/last.pt runs/sft_longer/last.pt",
             "What do more steps of SFT change on drawn faces: PSNR, or LPIPS?",
             gradient=("net",), random=True),
    Exercise("sigma", "diffusion", "model.Diffusion.sigma", 10,
             "how much of a step is chance", "Return the standard deviation of a sampling step.",
             ("`levels` returns abar at both ends of the step, also for s = -1.",
              "Which factor of the formula is 0 when s is the clean image?"),
             "python evaluate.py --ckpt runs/sft/last.pt --eta 0",
             "Compare eta = 0 with eta = 1: how much does this noise matter, against K?",
             float64=True),
    Exercise("ddim_mean", "diffusion", "model.Diffusion.ddim_mean", 15,
             "the two parts of a DDIM step", "Return the mean of a sampling step.",
             ("The noise in x_s has two sources: the part of eps that is kept, and fresh noise.",
              "`sigma` gives the fresh part; a root of a number just below 0 is nan."),
             "python evaluate.py --ckpt runs/sft/last.pt runs/lrpo/last.pt --frontier",
             "Does LRPO lie beyond everything that SFT's sampler reaches?", gradient=("x0", "eps")),
    Exercise("ddim_step", "diffusion", "model.Diffusion.ddim_step", 20,
             "from v to image and noise, and on to the next level",
             "Predict v, and turn it into the Gaussian of the next state.",
             ("The network wants t as a tensor of one int64 for each image: torch.full.",
              "v is a rotation of (x_0, eps); turn it back, then use `ddim_mean` and `sigma`."),
             f"{LRPO} --ddim_steps 10 --out runs/lrpo_k10",
             "Is a policy of ten steps further beyond SFT's frontier than one of five?",
             gradient=("net",), results=3, float64=True),
    Exercise("sample", "diffusion", "model.Diffusion.sample", 15,
             "the sampling loop", "Restore a batch by walking through the schedule.",
             ("What does x hold before the first step, and what does it not depend on?",
              "`gaussian(x, generator)` draws noise; s tells which step is the last."),
             "python evaluate.py --ckpt runs/sft/last.pt --best_of 8",
             "How much would someone gain who could choose the best of eight samples?",
             random=True),
    # --------------------------------------------------------------------- policy gradient
    Exercise("gaussian_log_prob", "policy", "lrpo.gaussian_log_prob", 10,
             "a sampling step as a stochastic policy", "Return the log density of an action.",
             ("torch.distributions.Normal has the answer for one pixel; write it out yourself.",
              "Convert to float32 first, and average over three dimensions at the end."),
             f"{LRPO} --gt_weight 0 --out runs/pg_alone",
             "What do the reward and PSNR do with the policy gradient alone, and why?",
             gradient=("mu",)),
    Exercise("group_advantages", "policy", "lrpo.group_advantages", 15,
             "a group as its own baseline", "Turn rewards into advantages within each group.",
             ("With keepdim=True the mean of a row can be subtracted from the row.",
              "Compute the group's standard deviation in both modes: MIN_STD judges by it."),
             f"{LRPO} --adv_std batch --out runs/lrpo_batch_std",
             "Does it matter whose standard deviation divides the advantage?"),
    Exercise("noise_level_weights", "policy", "lrpo.noise_level_weights", 5,
             "credit for noisy steps (strategy 3)", "Weight each step by its noise.",
             ("The weights must leave the mean size of an advantage as it was.",
              "It is one division."),
             f"{LRPO} {FULL} --noise_level_weights off --out runs/lrpo_no_weights",
             "Compare with the same command and weights on: which metric changes, and why?"),
    Exercise("clipped_loss", "policy", "lrpo.clipped_loss", 20,
             "PPO's trust region", "Return PPO's clipped loss and the ratio.",
             ("The ratio is made of logarithms; the old one is a number, the new one has a graph.",
              "Of the two objectives PPO takes the more pessimistic; and what is minimised is "
              "minus the objective."),
             f"{LRPO} --group 2 --batch_size 128 --out runs/lrpo_g2",
             "Two restorations of more images, or eight of fewer: which learns faster?", results=2),
    Exercise("gt_likelihood_loss", "policy", "lrpo.gt_likelihood_loss", 10,
             "a bounded likelihood loss (strategy 2)", "Turn log-likelihoods into L_gt.",
             ("What value has the loss for a very unlikely ground truth, what for a likely one?",
              "A density may exceed 1, so its logarithm may exceed 0: bound the exponent."),
             f"{LRPO} --pg_weight 0 --gt_weight 7 --out runs/likelihood_alone",
             "What does the likelihood alone do to PSNR and to the reward?",
             gradient=("log_prob",)),
    Exercise("rollout", "policy", "lrpo.LRPO.rollout", 30,
             "trajectories with what an update needs", "Sample trajectories and keep their steps.",
             ("It is the sampling loop, with a record of each step but the last.",
              "Store the state before the step, the action, and the log density that the policy "
              "gave to exactly this action; `policy` returns mu, sigma and x0_hat."),
             f"{LRPO} --ddim_steps 3 --out runs/lrpo_k3",
             "Is a policy of three steps as far beyond SFT's frontier as one of five?",
             random=True, results=2),
    Exercise("gt_log_prob", "policy", "lrpo.LRPO.gt_log_prob", 15,
             "the ground truth as an action", "Return the likelihood of the noised ground truth.",
             ("An action lies at the level where the step arrives.",
              "Make step.x_gt only if it is None: several updates share one draw. `gaussian` "
              "needs self.generator."),
             f"{LRPO} --recipe paper --rewards default --lpips_net squeeze --batch_size 8 "
             "--ddim_steps 5 --lr 1e-4 --out runs/paper",
             "Does the paper's weight of the likelihood, .001, hold this policy?",
             gradient=("mu",), random=True),
    Exercise("branch", "policy", "steered.BranchedLRPO.rollout", 25,
             "a comparison of equals: one noise differs", "Sample groups that branch at one step.",
             ("Which calls of the network can serve a whole group, and which cannot?",
              "Before the branch walk with `super().policy` and lq[::G]; then repeat_interleave "
              "the states, and go on with `self.policy` and all of lq."),
             f"{LRPO} {FULL} --out runs/lrpo_full",
             "Which part of the gain of our recipe is the branch's?", random=True, results=2),
    Exercise("gaussian_kl", "policy", "steered.gaussian_kl", 5,
             "the distance of two policies", "Return the KL divergence of two Gaussians.",
             ("The two have one sigma, so only the means can differ.",
              "Check it with one pixel: means one sigma apart are half a nat apart."),
             "python train.py --mode darl --kl_weight .1 --out runs/darl_kl",
             "What does a KL term take from the gain, and what from the loss?",
             gradient=("mu", "ref")),
    # -------------------------------------------------------------------- rewards and ReFL
    Exercise("ssim", "rewards", "rewards.ssim", 40,
             "local statistics as a measure of likeness", "Return the SSIM of each pair of images.",
             ("All of it can be made of one operation: a weighted mean over an 11 x 11 window.",
              "A variance is the mean of the square minus the square of the mean; two 1-D "
              "convolutions of (3B, 1, H, W) make the window."),
             "python -m tools.reward_report --rewards ssim=1,dwt=1",
             "To which damage is SSIM most and least sensitive?", gradient=("x",)),
    Exercise("low_pass", "rewards", "rewards.low_pass", 5,
             "what a low-pass keeps", "Return the low-pass band.",
             ("Windows overlap: they are twice as wide as they are apart.",
              "torch.nn.functional has a pooling for it."),
             "python -m tools.reward_report --rewards ssim=1,dwt=1",
             "Which damage does `dwt` punish far more than SSIM, and why?", gradient=("x",)),
    Exercise("dwt", "rewards", "rewards.dwt", 10,
             "a reward from a distance", "Turn the distance of low-pass bands into a reward.",
             ("In which range do the images come, and in which is the formula meant?",
              "Average the absolute difference for each image by itself."),
             f"{LRPO} --rewards offline --out runs/lrpo_offline",
             "This reward has no LPIPS in it: what does LPIPS, as an outside judge, say?",
             gradient=("x",)),
    Exercise("pair_loss", "rewards", "frm.pair_loss", 10,
             "learning a score from preferences", "Return the loss of preference pairs.",
             ("-log sigmoid(z) has another name, which does not overflow.",
              "A network that is surely wrong must have a large, finite loss: softplus."),
             f"{LRPO} --rewards face=1 --out runs/lrpo_face",
             "What happens to LPIPS when a learned score is the only reward?",
             gradient=("better", "worse")),
    Exercise("roll", "rewards", "refl.ReFL.roll", 10,
             "the part of sampling without gradient", "Sample from noise to sampling step k.",
             ("It is the sampling loop, cut off, with a new random eta in every turn.",
              "Draw eta with torch.rand and self.generator; self.schedule has the steps."),
             f"{REFL} --rewards face=0,ssim=0 --out runs/refl_no_reward",
             "What is left of ReFL's gain if its reward counts nothing?", random=True),
    Exercise("refl_losses", "rewards", "refl.ReFL.losses", 35,
             "a reward's gradient through one step",
             "Take step k with gradient and return the losses.",
             ("Every loss needs the gradient of the network; the frozen network needs none.",
              "Run the step inside `with block_outputs(net) as features`; run the frozen network "
              "in the same way, without gradient, and compare the two lists."),
             f"{REFL} --denoise_weight 0 --out runs/refl_no_denoise",
             "Which metrics pay when the supervised loss is taken away?", results=3),
    Exercise("update_frm", "rewards", "refl.ReFL.update_frm", 20,
             "a judge that keeps up with the policy", "Train the reward model for one step.",
             ("It is an ordinary training step: scores, loss, gradient, `optimiser_step`.",
              "Switch requires_grad on before the scores and off after the step; clear the old "
              "gradient."),
             f"{REFL} --rewards face=1 --denoise_weight 0 --steps 300 --frm_update_every 0 "
             "--out runs/refl_frozen",
             "Compare with --frm_update_every 10: how does hacking a frozen judge show?"),
    Exercise("blend_weight", "rewards", "darl.blend_weight", 10,
             "RL for the hard, supervision for the easy", "Return the share of RL of each image.",
             ("Three cases by the text of `blend`; each returns a tensor like rho.",
              "A comparison gives True and False: convert it to rho's dtype."),
             "python train.py --mode darl --blend hard --out runs/darl_hard",
             "Compare with --blend easy: for which half does a dB of PSNR buy more `face`?"),
]
