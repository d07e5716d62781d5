"""A Flax model as a Keras functional model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from .assembly import connect
from .checks import (
    check_has_batch,
    check_layer,
    check_not_training,
    checked_input_shape,
    no_such_layer,
    refuse_to_save,
)
from .fused import FusedModel, Truncated
from .graph import Graph, ModelFunction
from .layers import is_replaced, refuse_to_look_inside
from .linen import LinenFunction
from .outputs import Output
from .release import CacheEntry, release_all


class FlaxWrapper(keras.Model):
    r"""A Flax model as a Keras functional model, which Xplique can explain.

    Parameters
    ----------
    flax_module : flax.linen.Module
        The model. Its ``apply`` method is called with the parameters and the inputs.
    parameters : dict or FrozenDict
        What ``flax_module.init()`` returns: ``params``, and other collections that the model
        reads, such as ``batch_stats``. Flax models do not hold their parameters themselves. The
        arrays are copied: what happens to them later, the wrapped model does not see.
    input_shape : tuple of int, optional
        The shape of one sample, without the batch, such as ``(28, 28, 1)``. With it the model
        has layers, which Grad-CAM, Grad-CAM++, FEM, Guided Backprop, DeconvNet,
        ModelRandomization and sub-models need. Other methods do without.
    apply_kwargs : dict, optional
        Keyword arguments of each call, such as ``{"train": False}``.
    method : str or function, optional
        The method of the module that is called, by default ``__call__``, or a function
        ``method(module, inputs)``.
    rngs : dict, optional
        The random streams of a module that asks for some, such as
        ``{"dropout": jax.random.key(0)}``. They are the same ones at each call.
    output : str, int or function, optional
        Which array is explained where the module returns several: a key or an index of its
        output, or a function of it.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the accepted kind, or if they do not fit one another. What can
        be seen without inputs is raised here, and with ``input_shape`` everything is.

    Notes
    -----
    Inputs are an array or tensor of shape (N, \*input_shape), of any real dtype. They are
    computed on in float32, the outputs are float32, and a gradient has the dtype of the inputs.

    The model is called through one compiled JAX function per direction. The layers compute only
    for those who look inside: a layer whose ``call`` was replaced, a sub-model, a clone.

    Layers are named by their module's path, such as ``Block_0.Conv_1``. Each ReLU is a Keras
    ``ReLU`` layer. All that lies between two modules or ReLUs is one layer, named by the last thing
    that it does: a max pooling and the ``reshape`` after it are one layer ``reshape``. `summary`
    shows the names and shapes.
    Flax numbers modules in the order in which they are made: in ``nn.Dense(3)(nn.Dense(8)(x))``
    the outer one is ``Dense_0``. A module that is called twice is one layer with two nodes.

    The wrapper behaves as a Keras functional model does, and is tested to give the explanations
    of a native one with the same weights. It can't be trained, saved or exported through Keras.

    Threads may explain with one wrapper at the same time, but for Grad-CAM, Grad-CAM++ and TCAV:
    while they run they replace a layer's ``call``, of a native Keras model too.

    Examples
    --------
    A linear model, so that what to expect is known: the saliency of a class is the absolute value
    of its weights, whatever the inputs are.

    ```python
    import flax.linen as nn
    import jax
    import numpy as np
    from sklearn.datasets import load_iris
    from xplique.attributions import Saliency

    from xplique_flax import FlaxWrapper

    inputs, classes = load_iris(return_X_y=True)
    module = nn.Dense(3)
    parameters = module.init(jax.random.key(0), inputs)
    explainer = Saliency(FlaxWrapper(module, parameters))
    explanations = explainer(inputs, np.eye(3)[classes])

    kernel = parameters["params"]["kernel"]  # of shape (4, 3)
    print(np.allclose(explanations, abs(kernel).T[classes]))
    ```
    """

    _trackable_children = refuse_to_save

    def __init__(
        self,
        flax_module: Any,
        parameters: Any = None,
        *,
        input_shape: Sequence[int] | None = None,
        apply_kwargs: Mapping[str, Any] | None = None,
        method: str | Callable | None = None,
        rngs: Any = None,
        output: Output | None = None,
    ) -> None:
        shape = checked_input_shape(input_shape)
        function = LinenFunction(flax_module, parameters, apply_kwargs, method, rngs, output)
        self._assemble(function, shape)
        if shape is not None:
            self._check_no_batch_dimension(function, shape)

    def _assemble(self, function: ModelFunction, shape: tuple | None) -> None:
        release_all(FlaxWrapper)
        graph = None
        if shape is not None:
            graph = Graph(function, shape)
        inputs, outputs, variables = connect(function, graph, shape)
        super().__init__(inputs=inputs, outputs=outputs, name=function.name)
        entry = CacheEntry(self._inputs, self._outputs)
        self._replaceable = [
            layer for layer in self.layers if not isinstance(layer, keras.layers.InputLayer)
        ]
        self._fused = FusedModel(function, graph, variables, entry)

    def _check_no_batch_dimension(self, function: LinenFunction, shape: tuple[int, ...]) -> None:
        # Flax's convolutions fold an axis too many into the batch without a word.
        graph = self._fused.graph
        folds = graph is not None and len(shape) in graph.convolution_ranks
        if shape[0] == 1 and folds and function.accepts(shape[1:]):
            raise ValueError(
                f"`input_shape` is {shape}, which begins with a batch dimension of 1: the model's "
                f"convolutions take inputs of {len(shape)} dimensions, with the batch. Accepted is "
                f"the shape of one sample, without it. Pass {shape[1:]}."
            )

    @tf.autograph.experimental.do_not_convert
    def __call__(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the outputs, of shape (N, ...) and dtype float32, for inputs of shape (N, ...)."""
        if keras.utils.is_keras_tensor(inputs):
            return super().__call__(inputs)
        check_not_training(training)
        return self.call(inputs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
        """Compute the outputs of tensors, as ``__call__`` does."""
        tensor = self._fused.checked(inputs)
        self._release()
        if any(is_replaced(layer) for layer in self._replaceable):
            return super().call(tensor)
        return self._fused(tensor)

    def compute_output_spec(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Return the output's symbolic tensor, for a model that is part of another one."""
        shape = tuple(inputs.shape)
        return keras.KerasTensor((shape[0], *self._fused.output_shape(shape[1:])), dtype="float32")

    def truncate(self, layer: str | int) -> FlaxWrapper:
        """Return the model up to the output of a layer.

        It is what ``output_layer`` of Xplique's explainers would give, and as quick to call as
        the whole model: explain the logits of a model that ends in a softmax with it.

        Parameters
        ----------
        layer : str or int
            The name or index of the layer. Where a module is called several times, its first
            call counts, as for ``layer.output`` of Keras.

        Returns
        -------
        truncated : FlaxWrapper
            A model of its own, with the parameters that this one has now.

        Raises
        ------
        ValueError
            If there is no such layer, or if its output is not one array with the batch first.

        Examples
        --------
        The logits of a model that ends in a softmax:

        ```python
        import flax.linen as nn
        import jax
        import numpy as np
        import tensorflow as tf

        from xplique_flax import FlaxWrapper

        module = nn.Sequential([nn.Dense(3), nn.softmax])
        inputs = np.ones((2, 4), "float32")
        parameters = module.init(jax.random.key(0), inputs)
        wrapped = FlaxWrapper(module, parameters, input_shape=(4,))
        print([layer.name for layer in wrapped.layers])

        logits = wrapped.truncate("layers_0")
        print(np.allclose(tf.nn.softmax(logits(inputs)), wrapped(inputs)))
        ```
        """
        target = self._layer(layer)
        graph = self._fused.graph
        assert graph is not None and self._fused.shape is not None
        if target.name not in {cell.layer for cell in graph.cells}:
            raise ValueError(
                f"`layer` is {layer!r}, which computes nothing. Accepted are layers after it."
            )
        first = next(cell for cell in graph.cells if cell.layer == target.name)
        check_has_batch(target.name, first.outputs)
        truncated = FlaxWrapper.__new__(FlaxWrapper)
        truncated._assemble(Truncated(self._fused, graph, target.name), self._fused.shape)
        return truncated

    def get_layer(self, name: str | None = None, index: int | None = None) -> Any:
        """Return a layer by its name or index, as Keras's ``get_layer``."""
        if (name is None) == (index is None):
            return super().get_layer(name, index)
        return self._layer(index if name is None else name)

    def _layer(self, layer: str | int | None) -> Any:
        layers = self.layers
        check_layer(layer)
        if isinstance(layer, int):
            if not -len(layers) <= layer < len(layers):
                raise ValueError(
                    f"`layer` is {layer}, and the model has {len(layers)} layers. Accepted are "
                    f"indices from {-len(layers)} to {len(layers) - 1}."
                )
            return layers[layer]
        names = [known.name for known in layers]
        if layer in names:
            return layers[names.index(layer)]
        raise ValueError(no_such_layer(layer, names, self._fused.hidden))

    @property
    def outputs(self) -> Any:
        """The symbolic outputs."""
        core = vars(self).get("_fused")
        if core is not None:
            core.cache_entry.announce()
        return self._outputs

    def _release(self) -> None:
        """Leave the cache in which Xplique would keep this model alive for ever.

        It is done at each call, and costs a later explainer nothing.
        """
        self._fused.cache_entry.release()

    def get_weights(self) -> list[np.ndarray]:
        """Return the values of the parameters, layer by layer, in Keras's order."""
        self._require_inside()
        self._release()
        return super().get_weights()

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Set the values of the parameters, in the order of ``get_weights``."""
        self._require_inside()
        super().set_weights(weights)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the layers, with their outputs' shapes and their numbers of parameters."""
        self._require_inside()
        super().summary(*args, **kwargs)

    def count_params(self) -> int:
        """Return the number of parameters."""
        self._require_inside()
        return super().count_params()

    @property
    def layers(self) -> list[Any]:
        """The layers, for a model that was made with ``input_shape``."""
        if "_fused" in vars(self):  # else Keras is building the model
            self._require_inside()
        return super().layers

    def _require_inside(self) -> None:
        if self._fused.graph is None:
            refuse_to_look_inside()


def _refused(what: str, where: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"FlaxWrapper.{what}() is not available: a wrapped model is made to be explained. "
            f"{where}"
        )

    refuse.__name__ = what
    refuse.__doc__ = f"Not available. {where}"
    return refuse


_TRAIN = "Train the Flax module itself, for example with Optax, and wrap it again."
_SAVE = (
    "Save the parameters of the Flax module, for example with Orbax or flax.serialization, and "
    "wrap them again after restoring."
)
_EXPORT = "Export the Flax module itself, for example with jax.export."
for _name, _where in {
    "fit": _TRAIN,
    "train_on_batch": _TRAIN,
    "train_step": _TRAIN,
    "save": _SAVE,
    "save_weights": _SAVE,
    "load_weights": _SAVE,
    "get_config": _SAVE,
    "to_json": _SAVE,
    "export": _EXPORT,
    "quantize": _EXPORT,
}.items():
    setattr(FlaxWrapper, _name, _refused(_name, _where))
