// torch.classes.fastconv.Program: a list of operator calls that one call runs.
//
// Each call is an operator of PyTorch's registry with its arguments bound: tensors that stay the same (weights, static
// buffers), plain values, and slots, which hold what earlier calls returned or what the caller put in. Running it costs
// a copy of the arguments and the operator's own boxed call, under a microsecond: that is what Python, autograd and the
// allocation of every result cost otherwise.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "host/tensor.h"

namespace fastconv {
namespace {

class Program : public torch::CustomClassHolder {
 public:
  explicit Program(int64_t slots) : slots_(check_slots(slots)) {}

  // Appends a call. arguments: one for each of the schema's; the one at from[i] is taken from slot slot[i] instead.
  // results: the slots of what it returns (-1: dropped), or none.
  void call(const std::string& name, const std::string& overload, const c10::List<c10::IValue>& arguments,
            const std::vector<int64_t>& from, const std::vector<int64_t>& slot, const std::vector<int64_t>& results) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const size_t wanted = op.schema().arguments().size();
    TORCH_CHECK(arguments.size() == wanted, "Program: ", name, " expected ", wanted, " arguments, got ",
                arguments.size());
    TORCH_CHECK(from.size() == slot.size(), "Program: slot expected ", from.size(), " entries, got ", slot.size());
    TORCH_CHECK(results.empty() || results.size() == op.schema().returns().size(), "Program: results of ", name,
                " expected ", op.schema().returns().size(), " entries, got ", results.size());
    Call c{op, {}, {}, results};
    for (const c10::IValue& v : arguments) c.arguments.push_back(v);
    for (size_t i = 0; i < from.size(); ++i) {
      TORCH_CHECK_INDEX(from[i] >= 0 && from[i] < static_cast<int64_t>(wanted), "Program: from expected below ", wanted,
                        ", got ", from[i]);
      c.slots.emplace_back(from[i], at(slot[i]));
    }
    for (const int64_t r : results) {
      if (r >= 0) at(r);
    }
    calls_.push_back(std::move(c));
  }

  void put(int64_t slot, const at::Tensor& value) { slots_[at(slot)] = value; }
  at::Tensor get(int64_t slot) const { return slots_[at(slot)].toTensor(); }
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

  void run() {
    const PlainDispatch guard;
    torch::jit::Stack stack;
    for (const Call& c : calls_) {
      stack.assign(c.arguments.begin(), c.arguments.end());
      for (const auto& [argument, slot] : c.slots) stack[argument] = slots_[slot];
      c.op.callBoxed(stack);
      for (size_t i = 0; i < c.results.size(); ++i) {
        if (c.results[i] >= 0) slots_[c.results[i]] = std::move(stack[i]);
      }
    }
  }

 private:
  struct Call {
    c10::OperatorHandle op;
    std::vector<c10::IValue> arguments;
    std::vector<std::pair<int64_t, int64_t>> slots;
    std::vector<int64_t> results;
  };

  static size_t check_slots(int64_t slots) {
    TORCH_CHECK_VALUE(slots >= 0, "Program: slots expected at least 0, got ", slots);
    return static_cast<size_t>(slots);
  }
  int64_t at(int64_t slot) const {
    TORCH_CHECK_INDEX(slot >= 0 && slot < static_cast<int64_t>(slots_.size()), "Program: slot expected below ",
                      slots_.size(), ", got ", slot);
    return slot;
  }

  std::vector<c10::IValue> slots_;
  std::vector<Call> calls_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastconv, m) {
  m.class_<Program>("Program")
      .def(torch::init<int64_t>())
      .def("call", &Program::call)
      .def("put", &Program::put)
      .def("get", &Program::get)
      .def("size", &Program::size)
      .def("run", &Program::run);
}

}  // namespace fastconv
