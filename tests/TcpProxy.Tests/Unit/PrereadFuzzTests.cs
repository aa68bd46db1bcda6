using System;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using System.Text;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>Mutated first bytes. Whatever comes, a parser throws nothing and takes no more than there is; and the cut
/// of a stream changes nothing: what it has said of a beginning it also says when more has come.</summary>
public sealed class PrereadFuzzTests
{
    /// <summary>What mutation begins with; each is also tried as it is.</summary>
    private static readonly byte[][] Corpus =
    [
        .. new[]
        {
            "PROXY TCP4 10.0.0.1 192.168.1.2 50004 443\r\nGET /", "PROXY TCP6 2001:db8::1 ::1 50004 443\r\n",
            "PROXY UNKNOWN ffff:f...f:ffff 65535 65535\r\n", "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
            "GET / HTTP/1.1\r\n", "\r\n\r\n\0\r\nQUIT\n",
        }.Select(Encoding.ASCII.GetBytes),
        Written("10.0.0.1:50004", "192.168.1.2:443"), Written("[2001:db8::1]:50004", "[::1]:443"),
        Written(null, null), Written("/run/client", "/run/server"),
        Convert.FromHexString("0d0a0d0a000d0a515549540a2111001a0a000001c0a80102c35401bb040001aa03000400000000200000"),
        Hello.OpenSsl, Hello.OpenSslWithoutName, Hello.Records(Hello.OpenSsl[5..], 3),
        Hello.Make("a.example"), Hello.Make("pq.example", 1800), Hello.Make("pq.example", 300, 50),
    ];

    private static readonly byte[] Telling = [0, 1, 2, 3, 4, 10, 13, 22, 32, 0x11, 0x20, 0x21, 0x31, 0x7f, 0x80, 0xff];

    [Fact]
    public void The_parser_of_PROXY_headers() => FuzzTests.Run((random, i) => Try(Mutated(random, i), random, bytes =>
    {
        int taken = ProxyHeader.Parse(bytes, out EndPoint? source, out EndPoint? destination, out string? wrong);
        return (taken, wrong ?? (taken > 0 ? $"{Text.Of(source)} {Text.Of(destination)}" : null), wrong is not null);
    }));

    [Fact]
    public void The_parser_of_TLS_hellos() => FuzzTests.Run((random, i) => Try(Mutated(random, i), random, bytes =>
    {
        int taken = ServerName.Parse(bytes, out string? name, out string? wrong);
        Assert.True(name is null || (taken > 0 && ServerName.ParseList(name)[0] == name), name);
        return (taken, wrong ?? (taken > 0 ? name ?? "-" : null), wrong is not null);
    }));

    private static void Try(byte[] bytes, Random random, Func<byte[], (int Taken, string? Said, bool IsWrong)> parse)
    {
        try
        {
            (int taken, string? said, bool isWrong) = parse(bytes);
            Assert.InRange(taken, 0, bytes.Length);
            Assert.True(!isWrong || taken == 0);
            (_, string? early, bool isEarlyWrong) = parse(bytes[..random.Next(bytes.Length + 1)]);
            Assert.True(early is null || (early == said && isEarlyWrong == isWrong), $"first '{early}', then '{said}'");
        }
        catch (Exception e)
        {
            throw new InvalidOperationException($"{e.Message}\ninput: {Convert.ToHexString(bytes)}", e);
        }
    }

    private static byte[] Mutated(Random random, int i)
    {
        if (i < Corpus.Length)
        {
            return Corpus[i];
        }

        List<byte> bytes = [.. Corpus[random.Next(Corpus.Length)]];
        for (int mutations = random.Next(1, 6); mutations > 0; mutations--)
        {
            int at = random.Next(bytes.Count + 1);
            int count = Math.Min(random.Next(1, 9), bytes.Count - at);
            switch (random.Next(7))
            {
                case 0 when count > 0:
                    bytes[at] ^= (byte)(1 << random.Next(8));
                    break;
                case 1 when count > 0:
                    bytes[at] = Telling[random.Next(Telling.Length)];
                    break;
                case 2:
                    bytes.Insert(at, (byte)random.Next(256));
                    break;
                case 3:
                    bytes.RemoveRange(at, count);
                    break;
                case 4:
                    bytes.InsertRange(at, bytes.GetRange(at, count));
                    break;
                case 5:
                    bytes.RemoveRange(at, random.Next(4) == 0 ? bytes.Count - at : 0);
                    break;
                default:
                    byte[] other = Corpus[random.Next(Corpus.Length)];
                    bytes.InsertRange(at, other.AsSpan(random.Next(other.Length)));
                    break;
            }
        }

        return [.. bytes];
    }

    private static byte[] Written(string? source, string? destination)
    {
        byte[] header = new byte[ProxyHeader.LongestWritten];
        return header[..ProxyHeader.Write(header, ProxyVersion.V2, Parse(source), Parse(destination))];

        static EndPoint? Parse(string? text) => text is null ? null
            : text[0] == '/' ? new System.Net.Sockets.UnixDomainSocketEndPoint(text) : IPEndPoint.Parse(text);
    }
}
