// What the host side (conv_grouped.cpp) and the kernels (conv_grouped.h) of the convolution in narrow groups
// tell each other. Torch-free, no instruction set, raw pointers only: the host owns the arrays.
#pragma once

#include <cstdint>

#include "conv_rows_types.h"

namespace fastconv::cpu {

// Output columns out, out + step, ... of a row, `count` of them, that read the same filter columns.
struct GroupedRun {
  int64_t out, step, count;
};

// An output row: which run of rows it belongs to, and how many input elements behind the run's first row it reads.
struct GroupedRow {
  int64_t run, in;
};

// Taps of a filter row, `count` of them, each of which reads GroupedTask::advance elements behind the one before it:
// the input element that the first one reads at the first output of a run of rows and a run of columns, from the start
// of the image, its place in a panel, and the elements of a panel from one to the next.
struct GroupedLine {
  int64_t in, panel, next, count;
};

constexpr int64_t kGroupedSide = 4;  // images, or at least so many outputs of a row, that are summed side by side

// One thread's share of a forward pass (input x, output y) or a data gradient (input dz, output dx).
template <class T>
struct GroupedTask {
  const T* input;  // [n][input image]
  RowsEpilogue<T> epilogue;
  const GroupedRow* rows;  // [out_h]
  const GroupedRun* runs;  // of columns
  int64_t n_runs;
  const GroupedLine* lines;  // of row run a and column run b: [line_begin[i], line_begin[i + 1]), i = a * n_runs + b
  const int64_t* line_begin;
  int64_t step;        // input elements from one output column of a run to the next
  int64_t advance;     // input elements from one tap of a line to the next; where it is step, inputs slide
  int64_t n, at_once;  // images; how many of them, 1 or kGroupedSide, are worked on together
  int64_t in_image;    // elements
  int64_t out_h, out_w, channels;
  int64_t block;  // elements of a panel
  float* panels;  // of this thread: the weights of its channels, [block][tap][channel of the group][tile columns]
};

// Taps of the weight gradient that are summed in one pass over dz and x: with two vectors of each of a group's channels
// 16 or 18 sums, which with what they need fill 32 registers.
constexpr int grouped_taps(int group) { return group == 1 ? 9 : (group < 8 ? 8 / group : 1); }

template <class T>
struct GroupedWgradTask {
  const T *dz, *x;  // [n][p][q][channels], [n][h][w][channels]
  int64_t p, q, h, w, channels;
  int64_t stride_h, stride_w, pad_h, pad_w;
  // Of the taps of this pass: elements from the input position under a filter's first tap to what the tap reads; and
  // bit i of row_mask[p] & column_mask[q] says whether tap i reads inside the input there.
  const int64_t* offsets;
  const uint32_t *row_mask, *column_mask;
  // Where the taps are whole filter rows and the next output reads what this one read, `shift` taps further: 1 or 2,
  // for the columns [slide_begin, slide_end), where all of them read inside the input. Else 0.
  int64_t shift, slide_begin, slide_end;
};

// Taps of the filter row that a pass of so many taps consists of, or of each of its rows; 0: they do not slide.
constexpr int grouped_row_taps(int taps) { return taps == 5 || taps == 7 ? taps : taps % 3 == 0 ? 3 : 0; }

}  // namespace fastconv::cpu
