using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Linq;
using System.Text;

namespace TcpProxy.Tests;

/// <summary>TLS hellos: two that programs have sent, and as many made up as a test wants.</summary>
internal static class Hello
{
    /// <summary>openssl s_client 3.0, -servername www.example.com</summary>
    public static byte[] OpenSsl { get; } = Convert.FromHexString(
        "160301013c01000138030337e4d07159996d6bffc94ec0f2fa47efae1bd8572e00b8960b47171e8cd49d3e20bee2b1817aba"
        + "1cddd52578781bc276abd635daef1ff8871e6677d9afc9404dbc003e130213031301c02cc030009fcca9cca8ccaac02bc02f"
        + "009ec024c028006bc023c0270067c00ac0140039c009c0130033009d009c003d003c0035002f00ff010000b1000000140012"
        + "00000f7777772e6578616d706c652e636f6d000b000403000102000a00160014001d0017001e001900180100010101020103"
        + "0104002300000016000000170000000d002a0028040305030603080708080809080a080b0804080508060401050106010303"
        + "03010302040205020602002b0009080304030303020301002d00020101003300260024001d00209124ddf05beeac88b20425"
        + "e8b7c50aa198ee0450d0827f20f89e3b3981a9797f");

    /// <summary>The same with -noservername -tls1_2</summary>
    public static byte[] OpenSslWithoutName { get; } = Convert.FromHexString(
        "16030100b7010000b3030300e2016082fd5a620e4136e0ee26cdfbbfd2e820fd0043690f0e819fded1ef56000038c02cc030"
        + "009fcca9cca8ccaac02bc02f009ec024c028006bc023c0270067c00ac0140039c009c0130033009d009c003d003c0035002f"
        + "00ff01000052000b000403000102000a000c000a001d0017001e00190018002300000016000000170000000d002a00280403"
        + "05030603080708080809080a080b080408050806040105010601030303010302040205020602");

    /// <summary>A hello with GREASE (RFC 8701) where browsers put it, and a key share of so many bytes.</summary>
    public static byte[] Make(string? name, int keyShare = 32, int recordSize = 16384) =>
        Records(Message(name is null ? null : Encoding.ASCII.GetBytes(name), keyShare), recordSize);

    /// <summary>Without records. <paramref name="list"/> takes the place of the list of that one name.</summary>
    public static byte[] Message(byte[]? name, int keyShare = 32, byte[]? list = null)
    {
        List<byte> extensions = [0x0a, 0x0a, 0, 0]; // GREASE
        if (name is not null)
        {
            extensions.AddRange(Extension(0, list ?? Vector(2, [0, .. Vector(2, name)])));
        }

        extensions.AddRange(Extension(0x2b, [4, 0x7a, 0x7a, 3, 4])); // supported versions, GREASE first
        byte[] share = [.. Enumerable.Range(0, keyShare).Select(i => (byte)(i * 7))];
        extensions.AddRange(Extension(0x33, Vector(2, [0x11, 0xec, .. Vector(2, share)])));
        byte[] body =
        [
            3, 3, .. Enumerable.Range(0, 32).Select(i => (byte)i), .. Vector(1, new byte[32]),
            .. Vector(2, [0xaa, 0xaa, 0x13, 0x01]), .. Vector(1, [0]), .. Vector(2, [.. extensions]),
        ];
        return [1, 0, (byte)(body.Length >> 8), (byte)body.Length, .. body];
    }

    public static byte[] Records(byte[] message, int size) =>
        [.. message.Chunk(size).SelectMany(part => (byte[])[22, 3, 1, .. Vector(2, part)])];

    public static byte[] Vector(int prefix, byte[] content) =>
        prefix == 1 ? [(byte)content.Length, .. content] : [(byte)(content.Length >> 8), (byte)content.Length, .. content];

    private static byte[] Extension(ushort type, byte[] content)
    {
        byte[] head = new byte[2];
        BinaryPrimitives.WriteUInt16BigEndian(head, type);
        return [.. head, .. Vector(2, content)];
    }
}
