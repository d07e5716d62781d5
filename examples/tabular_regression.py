# %% [markdown]
# # Regression on tabular data
#
# You will have trained a Flax network that predicts a number from the columns of a
# table, explained single predictions and the whole model, and checked the explanations
# against things that are known: the sum that Integrated Gradients must give, exact
# Shapley values, a linear model, and what happens when columns are taken away.
#
# ## The data
#
# scikit-learn's diabetes table: ten measurements of 442 patients, and a score of how
# far the disease has progressed one year later. A hundred patients are held out.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tensorflow as tf
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

data = load_diabetes(scaled=False)
names = ["age", "sex", "bmi", "blood pressure", "total cholesterol", "LDL", "HDL"]
names += ["total/HDL", "log triglycerides", "glucose"]
split = train_test_split(data.data, data.target, test_size=100, random_state=42)
raw_train, raw_test, train_y, test_y = split

scaler = StandardScaler().fit(raw_train)
train_x = scaler.transform(raw_train).astype("float32")
test_x = scaler.transform(raw_test).astype("float32")

print(f"{len(train_x)} patients to learn from, {len(test_x)} held out")
print(f"progression: {train_y.mean():.0f} ± {train_y.std():.0f}")

# %% [markdown]
# !!! warning "Standardize, so that 0 means “average”"
#     Many methods compare the input with a *baseline*, and Xplique's is one number for
#     all columns (`baseline_value`, `ref_value`, `occlusion_value`; 0 if you don't say).
#     In raw units that would be a patient of age 0 without any blood pressure. After
#     `StandardScaler` it is the average patient of the training set, and an attribution
#     reads: *what this value contributes, compared with an average one*.
#
# ## The model
#
# A small multilayer perceptron. Its last line gives the prediction in the units of the
# score, so the explanations come in these units, too. Ridge regression, which anybody
# can read, is trained next to it for comparison.


# %%
class MLP(nn.Module):
    mean: float
    scale: float

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(32)(x))
        x = nn.silu(nn.Dense(32)(x))
        return self.mean + self.scale * nn.Dense(1)(x)


model = MLP(mean=float(train_y.mean()), scale=float(train_y.std()))
params = model.init(jax.random.key(0), train_x[:1])
optimizer = optax.adamw(3e-3, weight_decay=1.0)
state = optimizer.init(params)


def loss(params, x, y):
    return jnp.mean(((model.apply(params, x)[:, 0] - y) / model.scale) ** 2)


@jax.jit
def step(params, state, x, y):
    updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
    return optax.apply_updates(params, updates), state


rng = np.random.default_rng(0)
for _ in range(300):
    batch = rng.choice(len(train_x), 64)
    params, state = step(params, state, train_x[batch], train_y[batch])

# %%
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

ridge = RidgeCV(alphas=np.logspace(-1, 3, 20)).fit(train_x, train_y)
predictions = np.asarray(model.apply(params, test_x))[:, 0]
print(f"R² on held-out patients, MLP:   {r2_score(test_y, predictions):.3f}")
print(f"R² on held-out patients, ridge: {ridge.score(test_x, test_y):.3f}")

# %% [markdown]
# The network is a little better than the line. Both numbers depend on which patients
# are held out: with so few of them, another split moves both by 0.1 and more.
#
# ## Wrap and explain
#
# The wrapped model takes arrays of shape $(N, W)$, here $W = 10$, and returns
# $(N, 1)$. For a regression the targets say which output to explain: a column of ones
# selects the only one. For several outputs it would be one-hot.
#
# `operator="regression"` names the task. In Xplique it computes the same score as
# classification does, $\sum_k f_k(x)\,t_k$, and not an error: what is explained is the
# prediction itself.

# %%
from xplique.attributions import IntegratedGradients

from xplique_flax import FlaxWrapper

wrapped = FlaxWrapper(model, params)

inputs, targets = test_x, np.ones((len(test_x), 1), "float32")


def integrated_gradients(steps):
    explainer = IntegratedGradients(
        wrapped, operator="regression", steps=steps, batch_size=10 * steps
    )
    return np.array(explainer(inputs, targets))


explanations = integrated_gradients(steps=100)
print(inputs.shape, "→", explanations.shape)

# %% [markdown]
# One number per patient and column. For one patient, the contributions lead from the
# prediction for an average patient to the prediction for this one. Here is the held-out
# patient with the highest prediction:

# %% alt="Horizontal bars for one patient, one bar per column with its measured value. The bars to the right raise the prediction, those to the left lower it; log triglycerides, bmi, blood pressure and the ratio of total cholesterol to HDL have long bars to the right, total cholesterol has one to the left."
average = float(model.apply(params, np.zeros((1, 10), "float32"))[0, 0])
patient = int(predictions.argmax())
order = np.abs(explanations[patient]).argsort()

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
contributions = explanations[patient][order]
axes.barh(
    [f"{names[i]} = {raw_test[patient, i]:.3g}" for i in order],
    contributions,
    color=np.where(contributions > 0, "tab:orange", "tab:blue"),
)
axes.axvline(0, color="gray", linewidth=0.8)
axes.set_xlabel("contribution to the predicted progression")
axes.set_title(
    f"average patient {average:.0f}, this one {predictions[patient]:.0f} "
    f"(measured: {test_y[patient]:.0f})"
)
plt.show()

# %% [markdown]
# ## Do the contributions add up?
#
# Integrated Gradients promises *completeness*: for an input $x$ and a baseline $x'$,
#
# $$
# \sum_{i=1}^{W} \phi_i(x) = f(x) - f(x'),
# \qquad
# \phi_i(x) = (x_i - x'_i) \int_0^1
# \frac{\partial f}{\partial x_i}\bigl(x' + \alpha\,(x - x')\bigr)\,d\alpha .
# $$
#
# The integral is computed from a number of `steps`, so the equation holds up to an
# error that can be measured. Here it is, for all held-out patients:

# %% output="markdown"
difference = predictions - average

print("| steps | largest error | mean error |")
print("| ---: | ---: | ---: |")
for steps in (2, 10, 50):
    error = np.abs(integrated_gradients(steps).sum(axis=1) - difference)
    print(f"| {steps} | {error.max():.4f} | {error.mean():.4f} |")

# %% [markdown]
# The error falls as the number of steps grows. The default is 50 steps, and next to
# predictions that differ by a hundred points and more the rest is negligible. This check
# costs one line, and is worth doing whenever you choose `steps` or a baseline.
#
# ## Is Kernel SHAP right?
#
# The Shapley value of column $i$ is its mean contribution over all the orders in which
# the columns can be added to the baseline:
#
# $$
# \phi_i(x) = \sum_{S \subseteq \{1..W\},\ i \notin S}
# \frac{|S|!\,(W - |S| - 1)!}{W!}\,
# \bigl(f(x_{S \cup \{i\}}) - f(x_S)\bigr),
# $$
#
# where $x_S$ has the values of the patient in the columns of $S$, and the baseline's
# elsewhere. Ten columns have only $2^{10} = 1024$ subsets, so the exact values can be
# computed, and the other methods compared with them.

# %%
from math import factorial


def exact_shapley(x):
    width = len(x)
    subsets = (np.arange(2**width)[:, None] >> np.arange(width)) & 1
    outputs = np.asarray(model.apply(params, subsets * x))[:, 0]
    values = np.empty(width)
    for i in range(width):
        without = np.flatnonzero(subsets[:, i] == 0)
        size = subsets[without].sum(axis=1)
        weight = [factorial(s) * factorial(width - s - 1) for s in size]
        gain = outputs[without + 2**i] - outputs[without]
        values[i] = np.dot(weight, gain) / factorial(width)
    return values


few = slice(0, 20)
shapley = np.array([exact_shapley(x) for x in inputs[few]])
error = np.abs(shapley.sum(axis=1) - difference[few]).max()
print(f"they add up, too: largest error {error:.4f}")

# %% output="markdown"
from xplique.attributions import GradientInput, KernelShap, Lime, Occlusion, Saliency
from xplique.metrics import MuFidelity

options = {"operator": "regression", "batch_size": 2000}
explainers = {
    "Kernel SHAP, 100 samples": KernelShap(wrapped, nb_samples=100, **options),
    "Kernel SHAP, 2000 samples": KernelShap(wrapped, nb_samples=2000, **options),
    "LIME, 500 samples": Lime(wrapped, nb_samples=500, **options),
    "Occlusion": Occlusion(wrapped, patch_size=1, patch_stride=1, **options),
    "Gradient × input": GradientInput(wrapped, **options),
    "Saliency": Saliency(wrapped, **options),
}
tf.random.set_seed(0)
found = {"Integrated Gradients": explanations[few]}
for method, explainer in explainers.items():
    found[method] = np.array(explainer(inputs[few], targets[few]))

fidelity = MuFidelity(wrapped, inputs[few], targets[few], **options)

print(f"Mean size of a Shapley value: {np.abs(shapley).mean():.2f}\n")
print("| method | distance to Shapley | correlation | MuFidelity |")
print("| :--- | ---: | ---: | ---: |")
for method, values in found.items():
    distance = np.abs(values - shapley).mean()
    correlation = np.corrcoef(values.ravel(), shapley.ravel())[0, 1]
    score = fidelity(values)
    print(f"| {method} | {distance:.2f} | {correlation:.3f} | {score:.3f} |")

# %% [markdown]
# Kernel SHAP comes closer to the exact values with more samples. Integrated Gradients
# and LIME are close as well, for this network is smooth. Occlusion removes one column
# while all others are there, so that it misses how columns interact. Gradient × input
# follows the slope at the patient, and misses what bends on the way to the baseline,
# too. Saliency is the *size* of the slope: it has no sign and no baseline, and answers
# another question.
#
# MuFidelity knows nothing of Shapley values, and works for hundreds of columns, too. It
# removes random sets of columns and asks whether the prediction falls as the
# contributions say. By default it takes a fifth of the columns away at a time, here two
# of ten on average. That is nearly what Occlusion does, which therefore comes first: a
# metric, too, prefers the methods that ask its own question. And gradient × input comes
# second, farther from the Shapley values as it is: a high MuFidelity is not closeness
# to them.
#
# !!! tip "Seeds"
#     Kernel SHAP, LIME and MuFidelity draw from TensorFlow's generator:
#     `tf.random.set_seed(0)` makes them repeatable.
#
# ## What the model as a whole looks at
#
# The mean size of a column's contributions is a global importance. Two others can be
# had without Xplique: the coefficients of the ridge regression, whose columns have unit
# variance, too, and scikit-learn's permutation importance of the network, that is, how
# much $R^2$ it loses when a column is shuffled.

# %% alt="Three bar charts of ten columns each, sorted alike: mean size of the Integrated Gradients, size of the ridge coefficients, and permutation importance. Log triglycerides, bmi and blood pressure have long bars in all three, age and glucose short ones. Total cholesterol has the longest bar of the ridge coefficients, and a short one of permutation importance."
from sklearn.base import BaseEstimator
from sklearn.inspection import permutation_importance


class Predictor(BaseEstimator):
    def fit(self, x, y):
        return self

    def predict(self, x):
        return np.asarray(model.apply(params, x))[:, 0]


permutation = permutation_importance(
    Predictor(), test_x, test_y, scoring="r2", n_repeats=20, random_state=0
)
importance = np.abs(explanations).mean(axis=0)
order = importance.argsort()
charts = {
    "mean |Integrated Gradients|": importance,
    "|ridge coefficient|": np.abs(ridge.coef_),
    "permutation importance": permutation.importances_mean,
}

figure, row = plt.subplots(1, 3, figsize=(8, 3.6), sharey=True, layout="constrained")
for axes, (title, values) in zip(row, charts.items(), strict=True):
    axes.barh(np.array(names)[order], values[order])
    axes.set_title(title, fontsize=10)
plt.show()

# %%
from scipy.stats import spearmanr

for title, values in list(charts.items())[1:]:
    rank = spearmanr(importance, values).statistic
    print(f"rank correlation with {title}: {rank:.2f}")

lipids = np.corrcoef(train_x[:, 4], train_x[:, 5])[0, 1]
print(f"correlation of total cholesterol and LDL: {lipids:.2f}")

# %% [markdown]
# The three agree on most columns and differ most on the blood lipids, above all total
# cholesterol. It rises and falls with LDL, and the ridge regression gives the two
# weights of opposite sign, which partly cancel for most patients. Each number is right,
# for its own question: a contribution and a coefficient say what the *model* does with
# a column, not what the disease does.
#
# ## Does the order matter to the predictions?
#
# A ranking of columns can be tested: replace columns by their mean, the most important
# ones first, and follow $R^2$ on the held-out patients. A good ranking destroys the
# prediction early, and the reverse order late.


# %% alt="R squared on held-out patients against the number of columns replaced by their mean. Removing the most important columns first, the curve falls to nearly zero within three columns, then rises a little and falls again; removing the least important first, it stays high for eight columns. The mean of random orders lies between the two."
def curve(columns):
    masked, scores = test_x.copy(), []
    for column in [None, *columns]:
        if column is not None:
            masked[:, column] = 0
        scores.append(r2_score(test_y, model.apply(params, masked)[:, 0]))
    return scores


figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
axes.plot(curve(order[::-1]), "o-", label="most important first")
axes.plot(curve(order), "s--", label="least important first")
shuffles = [curve(np.random.default_rng(i).permutation(10)) for i in range(20)]
axes.plot(np.mean(shuffles, axis=0), ":", color="gray", label="random order, mean of 20")
axes.set_xlabel("columns replaced by their mean")
axes.set_ylabel("R² on held-out patients")
figure.legend(loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# Both curves leave the random order far behind. They need not fall steadily. When one
# of two correlated columns is replaced, the other contradicts it; replacing that one,
# too, can bring $R^2$ up again.
#
# ## The shape of an effect
#
# Contributions of one column, drawn against its value for all patients, show what the
# network learned that a line can't: where the points bend, the effect is not linear, and
# where they spread at one value, it depends on other columns. The line is the ridge
# regression's, $w_i x_i$.

# %% alt="Three scatter plots of contributions against the values of log triglycerides, bmi and blood pressure. In each the points follow the ridge regression's rising line closely in the middle. For log triglycerides they bend below it at high values, for bmi above it at both ends."
figure, row = plt.subplots(1, 3, figsize=(8, 3), sharey=True, layout="constrained")
for axes, column in zip(row, order[::-1][:3], strict=True):
    axes.scatter(raw_test[:, column], explanations[:, column], s=10)
    line = np.sort(test_x[:, column])
    axes.plot(np.sort(raw_test[:, column]), ridge.coef_[column] * line, color="gray")
    axes.set_xlabel(names[column])
row[0].set_ylabel("contribution")
plt.show()

# %% [markdown]
# The two models agree in the middle, where most patients are. At the ends the network
# bends: at high log triglycerides it expects less than the line, at a high body mass
# index more. Whether that is true of the disease is for data to decide: there are few
# patients out there.
#
# ## Which other methods take tables?
#
# All that don't need an image: SmoothGrad, VarGrad and SquareGrad, Rise, and, for
# networks with ReLUs and with `input_shape=(10,)`, Guided Backprop and DeconvNet.
# Grad-CAM, Grad-CAM++ and FEM need feature maps, and Sobol and HSIC cut an image into a
# grid.
#
# Go on with the [formats of inputs and targets](../guide/inputs.md), with
# [choosing a method by metrics](choosing_with_metrics.py), or with
# [time series](time_series.py).
