#include "signature.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fastconv {

pybind11::object signature(const pybind11::tuple& tensors) {
  c10::SmallVector<int64_t, 96> words;
  for (const pybind11::handle item : tensors) {
    if (item.is_none()) {
      words.push_back(-1);
      continue;
    }
    if (!THPVariable_Check(item.ptr())) throw pybind11::type_error("signature: expected a tuple of tensors or None");
    const at::Tensor& t = THPVariable_Unpack(item.ptr());
    if (t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return pybind11::none();
    // A subclass has rules of its own; Parameter is as good as Tensor.
    const bool plain = THPVariable_CheckExact(item.ptr());
    words.push_back(plain ? 0 : reinterpret_cast<int64_t>(Py_TYPE(item.ptr())));
    words.push_back(static_cast<int64_t>(t.key_set().raw_repr()));
    words.push_back(static_cast<int64_t>(t.scalar_type()) | static_cast<int64_t>(t.layout()) << 8 |
                    static_cast<int64_t>(t.requires_grad()) << 16 | static_cast<int64_t>(t.dim()) << 24);
    words.push_back(static_cast<int64_t>(t.device().type()) << 16 | (t.device().index() & 0xffff));
    const bool strided = t.layout() == at::kStrided;
    for (int64_t i = 0; i < t.dim(); ++i) {
      words.push_back(t.size(i));
      if (strided) words.push_back(t.stride(i));
    }
  }
  const auto local = c10::impl::tls_local_dispatch_key_set();
  words.push_back(static_cast<int64_t>(local.included_.raw_repr()));
  words.push_back(static_cast<int64_t>(local.excluded_.raw_repr()));
  words.push_back(static_cast<int64_t>(c10::GradMode::is_enabled()) |
                  static_cast<int64_t>(at::globalContext().deterministicAlgorithms()) << 1 |
                  static_cast<int64_t>(at::get_num_threads()) << 8);
  return pybind11::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

}  // namespace fastconv
