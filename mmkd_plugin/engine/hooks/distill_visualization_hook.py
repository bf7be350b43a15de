"""Hook that draws pictures of a distillation with the visualizer of the run."""
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...models.recording import undisturbed
from ...registry import HOOKS
from ...utils import check_number, unwrapped
from ...visualization.distill_pictures import check_drawable, draw_policy, draw_views, look, path_of, rgb_image

_HISTORY = 'policy_history'  # in the message hub, which checkpoints keep


@HOOKS.register_module()
class DistillVisualizationHook(Hook):
    """Draws attention, areas and logits of student and teacher on the first validation images, and DAFA's policy.

    The pictures go to all ``vis_backends`` of the visualizer, such as files and TensorBoard, under these names:

    ``distill_0``, ``distill_1``, ...
        One per image, with a row for each map of the distiller's layers: the attention (mean square over channels)
        of teacher and student; with DAM, its heatmap of each and its areas; with AMD, the positive and the negative
        map of each.
    ``distill_policy``
        With DAFA: the probability that an operation is applied to a batch, and the entropy of the selection, over the
        iterations. The curves continue after a resume and end with the search.

    With several teachers, the pictures have the rows of each, and each policy is ``distill_policy_NAME``.

    The hook draws before training, every ``interval`` iterations and after the last one. It runs its own forward
    passes in eval mode and float32. Training stays bit-identical, and there is no cost between pictures. The
    probabilities and their iterations are also in the message hub, as ``policy_history``.

    Args:
        interval: interval in iterations.
        num_images: largest number of images.

    Raises:
        ValueError: an argument is not a positive whole number; before training: the model is not a
            :class:`TeacherStudentDistill`, its distiller has no feature maps to draw, or there is no validation set.
    """

    def __init__(self, interval: int = 1000, num_images: int = 2) -> None:
        self.interval = check_number('DistillVisualizationHook.interval', interval, least=1, whole=True)
        self.num_images = check_number('DistillVisualizationHook.num_images', num_images, least=1, whole=True)

    def before_train(self, runner: Runner) -> None:
        self.model = unwrapped(runner.model)
        check_drawable(self.model)
        if runner.val_loop is None:
            raise ValueError('DistillVisualizationHook: val_dataloader is None, but the hook draws validation images. '
                             'Set val_dataloader, or remove the hook')
        if not is_main_process():
            return
        loader = runner.val_loop.dataloader
        with undisturbed(self.model):
            items = [loader.dataset[i] for i in range(min(self.num_images, len(loader.dataset)))]
        self.batches = [loader.collate_fn([item]) for item in items]
        self.images = [rgb_image(item, self.model.data_preprocessor) for item in items]
        self.names = [Path(path_of(item) or f'image {i} of the validation set').name for i, item in enumerate(items)]
        self.policies = {f'_{name}' if name else '': teacher.policy for name, teacher in self.model.teachers.items()
                         if teacher.policy is not None}
        self.histories = {name: runner.message_hub.get_info(_HISTORY + name) or dict(states={}, frozen=None)
                          for name in self.policies}
        self._draw_images(runner, runner.iter)
        for name in self.policies:
            self._draw_policy(runner, name, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if not is_main_process():
            return
        due = self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)
        if due:
            self._draw_images(runner, runner.iter + 1)
        for name, policy in self.policies.items():
            if self.histories[name]['frozen'] is None:
                if policy.frozen:
                    self._draw_policy(runner, name, runner.iter)  # frozen before this iteration
                elif due:
                    self._draw_policy(runner, name, runner.iter + 1)

    def _draw_images(self, runner: Runner, iteration: int) -> None:
        for i, (batch, image, name) in enumerate(zip(self.batches, self.images, self.names)):
            with undisturbed(self.model):
                data = self.model.data_preprocessor(batch, False)
                views = look(self.model, data['inputs'], data.get('data_samples'), image.shape[:2])
            picture = draw_views(image, views, f'{name}, after {iteration} iterations')
            runner.visualizer.add_image(f'distill_{i}', picture, iteration)

    def _draw_policy(self, runner: Runner, name: str, iteration: int) -> None:
        policy, history = self.policies[name], self.histories[name]
        if history['frozen'] is None:
            history['states'][iteration] = policy.state()
            history['frozen'] = iteration if policy.frozen else None
            runner.message_hub.update_info(_HISTORY + name, history)
        runner.visualizer.add_image(f'distill_policy{name}', draw_policy(**history), iteration)
