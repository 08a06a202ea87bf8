#include <builtin_pb/sentencepiece_model.pb.h>
#include <sentencepiece_processor.h>

#include "tokenizer/kinds.h"
#include "tokenizer/special_tokens.h"
#include "tokenizer/text_stages.h"

namespace llama_runner {

namespace {

class SentencePieceTokenizer final : public Tokenizer {
  public:
    Result<void> open(std::string_view data) {
        const auto status = model_.LoadFromSerializedProto({data.data(), data.size()});
        if (!status.ok()) {
            return Error{std::string("damaged sentencepiece tokenizer (") + status.error_message() +
                         "); copy the file again"};
        }
        for (int id = 0; id < model_.GetPieceSize(); ++id) {
            const std::string& piece = model_.IdToPiece(id);
            if (model_.IsControl(id)) {
                add_piece("", false);
                special_tokens_.add(piece, {id});
            } else if (model_.IsByte(id)) {
                const char byte = static_cast<char>(std::strtol(piece.c_str() + 1, nullptr, 16));  // "<0x0A>"
                add_piece({&byte, 1}, false);
            } else if (model_.IsUnknown(id)) {
                add_piece(" \xE2\x81\x87 ", false);  // SentencePiece's own text for <unk>
            } else {
                add_piece(replaced(piece, kSpaceMark, " "), true);
            }
            const auto kind = model_.model_proto().pieces(id).type();
            if (kind == sentencepiece::ModelProto::SentencePiece::USER_DEFINED) fixed_.emplace(piece, id);
        }
        return {};
    }

  protected:
    Result<void> encode_section(std::string_view text, bool, std::vector<int64_t>& ids) const override {
        std::vector<int> part;
        const auto status = model_.Encode({text.data(), text.size()}, &part);
        if (!status.ok()) return Error{std::string("the text cannot be encoded (") + status.error_message() + ")"};
        ids.insert(ids.end(), part.begin(), part.end());
        return {};
    }

    const SpecialTokens& special_tokens() const override { return special_tokens_; }

  private:
    sentencepiece::SentencePieceProcessor model_;
    SpecialTokens special_tokens_;
};

}  // namespace

Result<std::unique_ptr<Tokenizer>> open_sentencepiece(std::string_view data) {
    sentencepiece::SetMinLogLevel(100);
    auto tokenizer = std::make_unique<SentencePieceTokenizer>();
    if (auto opened = tokenizer->open(data); !opened) return opened.error();
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace llama_runner
