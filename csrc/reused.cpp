// torch.classes.fastconv.Reused: memory for tensors that the caller hands out and gets back when nobody holds them.
//
// A training step makes its gradients anew, and the optimizer's zero_grad() drops them. malloc gives blocks of that
// size back to the system, so every step would pay for fresh pages: the kernel clears each, 1 us for 4 KiB.

#include <ATen/ops/empty_strided.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "host/tensor.h"

namespace fastconv {
namespace {

class Reused : public torch::CustomClassHolder {
 public:
  // like: dense tensors whose sizes, strides and dtypes the others have.
  explicit Reused(const std::vector<at::Tensor>& like) {
    for (const at::Tensor& t : like) {
      shapes_.push_back({t.sizes().vec(), t.strides().vec(), t.options()});
    }
    kept_.resize(shapes_.size());
  }

  // One tensor of each shape with undefined contents, each the only one of its memory.
  std::vector<at::Tensor> take() {
    const PlainDispatch guard;
    std::vector<at::Tensor> out;
    out.reserve(kept_.size());
    for (size_t i = 0; i < kept_.size(); ++i) {
      Kept& kept = kept_[i];
      // Whoever holds a view, an array of numpy's or a saved tensor holds the storage; another process has it where its
      // memory was moved to be shared.
      const bool free = kept.tensor.defined() && kept.tensor.storage().use_count() == 1 &&
                        kept.tensor.storage().data() == kept.memory;
      if (!free) {
        const Shape& s = shapes_[i];
        kept.tensor = at::empty_strided(s.sizes, s.strides, s.options);
        kept.memory = kept.tensor.storage().data();
      }
      // Another tensor of the same storage, so that autograd finds one that nobody else has and need not copy it.
      out.emplace_back(kept.tensor.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), false));
    }
    return out;
  }

  // Lets go of the memory.
  void clear() {
    for (Kept& kept : kept_) kept = {};
  }

 private:
  struct Shape {
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
  };
  struct Kept {
    at::Tensor tensor;
    const void* memory = nullptr;  // where it was made
  };
  std::vector<Shape> shapes_;
  std::vector<Kept> kept_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastconv, m) {
  m.class_<Reused>("Reused")
      .def(torch::init<std::vector<at::Tensor>>())
      .def("take", &Reused::take)
      .def("clear", &Reused::clear);
}

}  // namespace fastconv
